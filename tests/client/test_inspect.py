"""`fluxserve-client inspect`: what it reads from our files, and what strangers' files can't make it do."""

from __future__ import annotations

import io
import json
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from fluxserve_client.cli import main
from fluxserve_client.inspection import read_xmp
from PIL import Image, PngImagePlugin

from fluxserve.media.images import write_image
from fluxserve.media.provenance import Provenance, System
from fluxserve.media.signing import Signer
from tests.support.signers import Identity, identity, with_another_pixel

KINDS = ["png", "jpeg", "webp"]
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
OWN = {"task": "text-to-image", "guidance": "3.5"}
MADE = Provenance(System("flux.1-dev", "fused", "fp8"), 7, 28, 48, 64, OWN, "a 🦊 & ]]>\nin two lines")
PACKET = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">%s</r:RDF>'
    b"</x:xmpmeta>"
)


@pytest.fixture(scope="module")
def identity_files(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return identity(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def signed(identity_files: Identity) -> dict[str, bytes]:
    signer = Signer(identity_files.chain, identity_files.key, "flux.1-dev")
    return {kind: signer.sign(write_image(PICTURE, kind, 90, MADE), kind) for kind in KINDS}


@pytest.fixture
def inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Status and JSON for the bytes of a file."""

    def run(data: bytes, *options: str) -> tuple[int, dict[str, Any]]:
        file = tmp_path / "picture"
        file.write_bytes(data)
        status = main(["inspect", "--json", str(file), *options])
        return status, json.loads(capsys.readouterr().out)

    return run


def with_xmp(packet: bytes) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "webp", xmp=packet)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_a_file_says(inspected: Any, kind: str) -> None:
    status, found = inspected(write_image(PICTURE, kind, 90, MADE))
    assert status == 0
    assert (found["format"], found["height"], found["width"], found["made_by_a_model"]) == (kind, 48, 64, True)
    assert found["xmp"] == {
        "Iptc4xmpExt:DigitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
        "Iptc4xmpExt:AISystemUsed": "flux.1-dev",
        "Iptc4xmpExt:AISystemVersionUsed": "fluxserve 0.1.0",
        "Iptc4xmpExt:AIPromptInformation": MADE.prompt,
        "xmp:CreatorTool": "fluxserve 0.1.0",
        **{"fluxserve:task": "text-to-image", "fluxserve:seed": "7", "fluxserve:steps": "28"},
        **{"fluxserve:guidance": "3.5", "fluxserve:height": "48", "fluxserve:width": "64"},
        **{"fluxserve:engine": "fused", "fluxserve:precision": "fp8"},
    }
    assert found["parameters"] == (MADE.parameters() if kind == "png" else "")
    assert (found["c2pa"], found["c2pa_checked"], found["problems"]) == (None, True, [])


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature(inspected: Any, signed: dict[str, bytes], identity_files: Identity, kind: str) -> None:
    status, found = inspected(signed[kind])
    assert (status, found["problems"]) == (0, [])
    assert found["c2pa"] == {
        **{"state": "valid", "signer": "Example Signer", "issuer": "Example Studio", "algorithm": "Es256"},
        **{"generator": "fluxserve 0.1.0", "failures": []},
        "source_types": ["http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"],
    }
    status, found = inspected(signed[kind], "--trust", str(identity_files.authority))
    assert (status, found["c2pa"]["state"]) == (0, "trusted")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pixel_that_changed(inspected: Any, signed: dict[str, bytes], kind: str) -> None:
    status, found = inspected(with_another_pixel(signed[kind], kind))
    assert (status, found["c2pa"]["state"]) == (1, "invalid")
    assert any("assertion.dataHash.mismatch" in problem for problem in found["problems"])


def test_a_signer_whom_nobody_trusts(inspected: Any, signed: dict[str, bytes], tmp_path: Path) -> None:
    status, found = inspected(signed["png"], "--trust", str(identity(tmp_path / "other").authority))
    assert (status, found["c2pa"]["state"]) == (1, "valid")
    assert found["problems"] == ["C2PA: signingCredential.untrusted: signing certificate untrusted"]


def test_for_a_reader(signed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / "signed.png", tmp_path / "plain.jpg", tmp_path / "photo.webp"]
    for file, data in zip(
        files, (signed["png"], write_image(PICTURE, "jpeg", 90, MADE), write_image(PICTURE, "webp", 90)), strict=True
    ):
        file.write_bytes(data)
    assert main(["inspect", *map(str, files)]) == 0
    first, second, third = re.split(r"\n(?=/)", capsys.readouterr().out)
    assert re.search(r"source +a trained model made it", first)
    assert re.search(r"fluxserve:seed +7\n", first)
    assert re.search(r"C2PA +valid: the file is unchanged; --trust .*'Example Signer' of 'Example Studio'", first)
    assert re.search(r"C2PA +no manifest", second)
    assert re.search(r"source +nothing says that a model made it", third)


def test_a_terminal_gets_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a\x1b]0;title\x07 fox")
    prompt = replace(MADE, prompt="a \x9b31m \u202e fox")
    texts.add_itxt("XML:com.adobe.xmp", prompt.xmp().decode())
    Image.fromarray(PICTURE).save(tmp_path / "a.png", pnginfo=texts)
    assert main(["inspect", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "\\x9b31m \\u202e fox" in out and "a\\x1b]0;title\\x07 fox" in out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)


BOMB = b'<!DOCTYPE b [<!ENTITY a "%s">%s]>' % (
    b"x" * 1000,
    b"".join(b'<!ENTITY %c "%s">' % (98 + k, b"&%c;" % (97 + k) * 10) for k in range(9)),
)
HOSTILE = {
    "entities in entities": BOMB + PACKET % b"<r:Description><t>&j;</t></r:Description>",
    "a file by an entity": b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><x>&e;</x>',
    "in UTF-16, where no search for DOCTYPE finds it": '<!DOCTYPE x [<!ENTITY e "y">]><x>&e;</x>'.encode("utf-16"),
    "an entity that nothing declares": PACKET % b"<r:Description><t>&e;</t></r:Description>",
    "no XML": b"\xff\xfe\x00 nonsense <<<",
    "an end that is missing": (PACKET % b"")[:-5],
    "too much": PACKET % (b"<r:Description><t>" + b"x" * (1 << 20) + b"</t></r:Description>"),
}


@pytest.mark.parametrize("packet", HOSTILE.values(), ids=HOSTILE)
def test_xml_of_strangers(inspected: Any, packet: bytes) -> None:
    """It is a problem of the file, and the rest is read."""
    status, found = inspected(with_xmp(packet))
    assert (status, found["xmp"], found["format"]) == (1, {}, "webp")
    assert found["problems"][0].startswith("XMP: ")


def test_deep_xml_costs_no_recursion() -> None:
    deep = b"<a>" * 20_000 + b"text" + b"</a>" * 20_000
    packet = PACKET % (b'<r:Description xmlns:q="urn:q"><q:deep>' + deep + b"</q:deep></r:Description>")
    assert read_xmp(packet) == {"{urn:q}:deep": "text"}


def test_other_ways_to_write_xmp() -> None:
    """Attributes, lists, resources, several descriptions; the padding that a packet may end in."""
    body = (
        b'<r:Description xmlns:d="http://purl.org/dc/elements/1.1/" xmlns:q="urn:q" r:about="" d:format="image/png">'
        b"<d:creator><r:Seq><r:li>A</r:li><r:li>B</r:li></r:Seq></d:creator>"
        b'<q:link r:resource="urn:z"/></r:Description>'
        b'<r:Description xmlns:q="urn:q"><q:more/></r:Description>'
    )
    assert read_xmp(PACKET % body + b" \n" * 100 + b"\0") == {
        **{"dc:format": "image/png", "dc:creator": "A B", "{urn:q}:link": "urn:z", "{urn:q}:more": ""},
    }


def test_no_address_in_a_file_is_contacted(inspected: Any) -> None:
    """C2PA lets a file name the place of its manifest, and c2pa-python fetches it unless it is told not to."""
    calls: list[object] = []

    class Notes(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            calls.append(self.client_address)

    with socketserver.TCPServer(("127.0.0.1", 0), Notes) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a.c2pa"
        packet = MADE.xmp().replace(
            b' rdf:about=""',
            f' rdf:about="" xmlns:dcterms="http://purl.org/dc/terms/" dcterms:provenance="{url}"'.encode(),
        )
        status, found = inspected(with_xmp(packet))
        with pytest.raises(c2pa.C2paError, match="could not fetch"):
            c2pa.Reader("image/webp", io.BytesIO(with_xmp(packet)))
        server.shutdown()
        thread.join()
    assert len(calls) == 1, "only the library as it comes"
    assert (status, found["c2pa"]["state"]) == (1, "unread")
    assert found["problems"] == [f"C2PA: Remote: must fetch remote manifests from url {url}"]
    assert found["xmp"]["fluxserve:seed"] == "7", "the rest is read"


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "got 0 bytes, expected a PNG"), (b"GIF89a", "expected a PNG, JPEG or WebP"), (None, "No such file")],
)
def test_what_is_no_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes | None, message: str
) -> None:
    if data is not None:
        (tmp_path / "a.png").write_bytes(data)
    assert main(["inspect", str(tmp_path / "a.png")]) == 2
    assert message in capsys.readouterr().err


def test_authorities_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(write_image(PICTURE, "png", 90))
    (tmp_path / "none.pem").write_text("rubbish")
    assert main(["inspect", str(tmp_path / "a.png"), "--trust", str(tmp_path / "none.pem")]) == 2
    assert "--trust: got " in capsys.readouterr().err


def test_without_the_library_it_says_so(
    inspected: Any, signed: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    status, found = inspected(signed["png"])
    assert (status, found["c2pa"], found["c2pa_checked"]) == (0, None, False)
    (tmp_path / "a.png").write_bytes(signed["png"])
    assert main(["inspect", str(tmp_path / "a.png")]) == 0
    assert "not checked: c2pa-python is not installed" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "a.png"), "--trust", "a.pem"]) == 2
    assert "--trust: c2pa-python is not installed" in capsys.readouterr().err


def test_it_needs_no_torch_and_no_server(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(write_image(PICTURE, "png", 90, MADE))
    code = "import sys; sys.modules.update(torch=None, fluxserve=None); from fluxserve_client.cli import main; main()"
    ended = subprocess.run(
        [sys.executable, "-c", code, "inspect", "a.png"], capture_output=True, cwd=tmp_path, check=True, text=True
    )
    assert "trainedAlgorithmicMedia" in ended.stdout and not ended.stderr
