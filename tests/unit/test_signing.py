"""media/signing.py: C2PA manifests, judged by the same library's reader; and what may not sign."""

import io
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image

from fluxserve import settings
from fluxserve.cli.main import main
from fluxserve.errors import SettingsError, SigningFailed
from fluxserve.media.images import write_image
from fluxserve.media.signing import Signer
from fluxserve.serving.files import open_signer
from tests.support.signers import Identity, identity, with_another_pixel
from tests.unit.test_provenance import FORMATS, MADE, PICTURE

OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
KEYS: dict[str, Callable[[], Any]] = {
    "Es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "Es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "Es512": lambda: ec.generate_private_key(ec.SECP521R1()),
    "Ps256": lambda: rsa.generate_private_key(65537, 2048),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.fixture(scope="module")
def signer_files(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return identity(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def signer(signer_files: Identity) -> Signer:
    return Signer(signer_files.chain, signer_files.key, "flux.1-dev")


def read(file: bytes, kind: str, authority: Path | None = None) -> dict[str, Any]:
    trust = {"trust": {"trust_anchors": authority.read_text()}} if authority else {}
    with c2pa.Reader(f"image/{kind}", io.BytesIO(file), context=c2pa.Context.from_dict({**OFFLINE, **trust})) as reader:
        return json.loads(reader.json())


def codes(store: dict[str, Any]) -> set[str]:
    return {status["code"] for status in store.get("validation_status", ())}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_signed_file_is_valid_and_says_that_a_model_made_it(
    signer: Signer, signer_files: Identity, kind: str
) -> None:
    plain = write_image(PICTURE, kind, 90, MADE)
    signed = signer.sign(plain, kind)
    store = read(signed, kind, signer_files.authority)
    assert store["validation_state"] == "Trusted" and codes(store) == set()
    assert read(signed, kind)["validation_state"] == "Valid", "by whomever it was signed"
    manifest = store["manifests"][store["active_manifest"]]
    (actions,) = (a["data"]["actions"] for a in manifest["assertions"] if a["label"].startswith("c2pa.actions"))
    assert [a["action"] for a in actions] == ["c2pa.created"]
    assert actions[0]["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
    assert actions[0]["softwareAgent"]["name"] == "flux.1-dev"
    before, after = (Image.open(io.BytesIO(file)) for file in (plain, signed))
    assert np.array_equal(np.asarray(before), np.asarray(after)), "pixels are untouched"
    assert before.info["xmp"] == after.info["xmp"]
    assert len(signed) - len(plain) < 8192, "no thumbnail"


@pytest.mark.parametrize("kind", FORMATS)
def test_a_pixel_that_changes_breaks_the_signature(signer: Signer, kind: str) -> None:
    store = read(with_another_pixel(signer.sign(write_image(PICTURE, kind, 90, MADE), kind), kind), kind)
    assert store["validation_state"] == "Invalid" and "assertion.dataHash.mismatch" in codes(store)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_the_file_says_is_signed_too(signer: Signer, kind: str) -> None:
    signed = signer.sign(write_image(PICTURE, kind, 90, MADE), kind)
    assert signed.count(b"seed>7<") == 1
    store = read(signed.replace(b"seed>7<", b"seed>8<"), kind)
    assert store["validation_state"] == "Invalid" and "assertion.dataHash.mismatch" in codes(store)


def test_another_picture_below_the_manifest_is_noticed(signer: Signer) -> None:
    """A PNG that is decoded, changed by one level in one pixel and written again, with the manifest put back."""
    signed = signer.sign(write_image(PICTURE, "png", 90, MADE), "png")
    begin = signed.index(b"caBX") - 4
    manifest = signed[begin : begin + 12 + int.from_bytes(signed[begin : begin + 4])]
    changed = PICTURE.copy()
    changed[0, 0, 0] ^= 1
    forged = write_image(changed, "png", 90, MADE)
    store = read(forged[:33] + manifest + forged[33:], "png")
    assert store["validation_state"] == "Invalid" and "assertion.dataHash.mismatch" in codes(store)


@pytest.mark.parametrize("algorithm", KEYS)
def test_every_kind_of_key(tmp_path: Path, algorithm: str) -> None:
    made = identity(tmp_path, KEYS[algorithm]())
    store = read(Signer(made.chain, made.key, "tiny").sign(write_image(PICTURE, "png", 90), "png"), "png")
    assert store["validation_state"] == "Valid"
    assert store["manifests"][store["active_manifest"]]["signature_info"]["alg"] == algorithm


def test_threads_share_a_signer(signer: Signer) -> None:
    files = [write_image(PICTURE, kind, 90, MADE) for kind in FORMATS]
    with ThreadPoolExecutor(4) as pool:
        signed = list(pool.map(lambda k: signer.sign(files[k % 3], FORMATS[k % 3]), range(24)))
    assert all(read(file, FORMATS[k % 3])["validation_state"] == "Valid" for k, file in enumerate(signed))


def test_what_can_not_be_signed_is_an_error_and_no_file(signer: Signer) -> None:
    with pytest.raises(SigningFailed, match=r"signature: .*not sent without one"):
        signer.sign(b"no picture", "png")


def _unreadable(made: Identity) -> Identity:
    made.key.unlink()
    made.key.mkdir()
    return made


REFUSED: dict[str, tuple[Callable[[Path], Identity], str]] = {
    "no certificate": (lambda d: Identity(d / "none.pem", identity(d).key, d), "c2pa_certificate: .*none.pem.*No such"),
    "no key": (lambda d: Identity(identity(d).chain, d / "none.pem", d), "c2pa_key: .*none.pem.*No such file"),
    "a folder": (lambda d: _unreadable(identity(d)), "c2pa_key: .*can be read.*Is a directory"),
    "no PEM": (lambda d: Identity(Path(__file__), identity(d).key, d), "c2pa_certificate: .*certificates in PEM"),
    "no key in it": (lambda d: Identity(identity(d).chain, d / "chain.pem", d), "c2pa_key: .*a private key in PEM"),
    "an encrypted key": (lambda d: identity(d, password=b"secret"), "c2pa_key: .*not encrypted"),
    "another's key": (
        lambda d: Identity(identity(d / "a").chain, identity(d / "b").key, d),
        "c2pa_key: .*allowed: the key of .*chain.pem",
    ),
    "expired": (lambda d: identity(d, days=(-9, -1)), "c2pa_certificate: .*valid today"),
    "not valid yet": (lambda d: identity(d, days=(1, 9)), "c2pa_certificate: .*valid today"),
    "a web server's": (
        lambda d: identity(d, usage=ExtendedKeyUsageOID.SERVER_AUTH),
        "c2pa_certificate: .*emailProtection",
    ),
    "a weak key": (lambda d: identity(d, rsa.generate_private_key(65537, 1024)), "c2pa_certificate: .*takes"),
    "a curve of its own": (lambda d: identity(d, ec.generate_private_key(ec.SECP256K1())), "c2pa_key: .*secp256r1"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_may_not_sign_is_refused_when_it_is_opened(
    tmp_path: Path, make: Callable[[Path], Identity], message: str
) -> None:
    made = make(tmp_path)
    config = settings.Settings(c2pa_certificate=str(made.chain), c2pa_key=str(made.key))
    with pytest.raises(SettingsError, match=message):
        open_signer(config, "tiny")


def test_a_certificate_and_its_key_are_set_together() -> None:
    for name, missing in (("c2pa_certificate", "c2pa_key"), ("c2pa_key", "c2pa_certificate")):
        with pytest.raises(SettingsError, match=f"{missing}: got ''; allowed: .*together"):
            open_signer(settings.load({name: {"string_value": "a.pem"}}), "tiny")
    assert open_signer(settings.Settings(), "tiny") is None


@pytest.mark.parametrize("library", ["c2pa", "cryptography"])
def test_without_the_library_nothing_is_left_unsigned(
    signer_files: Identity, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    config = settings.Settings(c2pa_certificate=str(signer_files.chain), c2pa_key=str(signer_files.key))
    monkeypatch.delitem(sys.modules, "fluxserve.media.signing")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(SettingsError, match=r"c2pa_certificate: .*pip install 'fluxserve\[provenance\]'"):
        open_signer(config, "tiny")


def test_the_command_line_signs_and_its_doctor_says_what_a_server_would_refuse(
    signer_files: Identity, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one model, drawn once."""
    monkeypatch.setenv("FLUXSERVE_C2PA_CERTIFICATE", str(signer_files.chain))
    monkeypatch.setenv("FLUXSERVE_C2PA_KEY", str(signer_files.key))
    out = tmp_path / "fox.webp"
    size = ["--height", "64", "--width", "64", "--num-inference-steps", "1", "--seed", "3"]
    assert main(["generate", "a fox", *size, "-o", str(out)]) == 0
    store = read(out.read_bytes(), "webp", signer_files.authority)
    assert store["validation_state"] == "Trusted"
    assert b"<fluxserve:seed>3<" in out.read_bytes() and b"fox" not in out.read_bytes()
    assert main(["doctor"]) == 0
    assert f"ok    signature: C2PA, with {signer_files.chain}" in capsys.readouterr().out
    monkeypatch.setenv("FLUXSERVE_C2PA_KEY", str(identity(tmp_path / "other").key))
    assert main(["doctor"]) == 1
    assert "FAIL  signature: c2pa_key: got " in capsys.readouterr().out
    assert main(["generate", "a fox", *size, "-o", str(tmp_path / "b.png")]) == 1
    assert not (tmp_path / "b.png").exists()
