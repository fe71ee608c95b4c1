"""Files of a real server say what made them, and a server with a certificate signs them: for plain tritonclient."""

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import c2pa
import numpy as np
import pytest
from PIL import Image

from fluxserve import __version__
from fluxserve.errors import ServerError
from fluxserve.supervisor import Ports, TritonServer
from fluxserve.supervisor.installation import bundled
from tests.support.signers import Identity, identity, with_another_pixel
from tests.triton.conftest import READY_S, REPOSITORY, PlainClient, pixels, plain, serving

pytestmark = pytest.mark.xdist_group("triton")

PROMPT = "a red fox & a cat ]]> 🦊"
SMALL = {"seed": 7, "height": 64, "width": 96, "num_inference_steps": 2}
OFFLINE = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return identity(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def signing_server(signer: Identity) -> Iterator[TritonServer]:
    with serving(c2pa_certificate=str(signer.chain), c2pa_key=str(signer.key)) as started:
        yield started


def said(file: bytes) -> dict[str, str]:
    """The properties of a file's XMP by their names without a namespace."""
    (description,) = ElementTree.fromstring(Image.open(io.BytesIO(file)).info["xmp"]).iterfind(".//{*}Description")
    return {each.tag.partition("}")[2]: each.text or "" for each in description}


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_picture_says_that_a_machine_made_it(client: PlainClient, kind: str) -> None:
    files = client.draw(PROMPT, **SMALL, num_images=2, output_format=kind, guidance_scale=0.6)["images"]
    for k, file in enumerate(files):
        assert said(file) == {
            "DigitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia",
            **{"AISystemUsed": "tiny", "AISystemVersionUsed": f"fluxserve {__version__}"},
            **{"CreatorTool": f"fluxserve {__version__}", "task": "text-to-image", "seed": str(7 + k), "steps": "2"},
            **{"guidance": "0.6", "height": "64", "width": "96", "engine": "torch_eager", "precision": "float32"},
        }
        assert b"fox" not in file, "the prompt is its caller's"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_the_prompt_is_in_the_file_if_its_caller_wants_that(client: PlainClient, kind: str) -> None:
    fields = {**SMALL, "output_format": kind}
    asked, plain_file = (client.draw(PROMPT, **fields, embed_prompt=wanted)["images"][0] for wanted in (True, False))
    assert said(asked)["AIPromptInformation"] == PROMPT
    assert "AIPromptInformation" not in said(plain_file)
    assert np.array_equal(pixels(asked), pixels(plain_file)), "the same picture"


def test_what_a_picture_is_drawn_from_is_said_too(client: PlainClient) -> None:
    first = client.draw(**SMALL)["images"][0]
    again = client.draw(**SMALL, image=first, strength=0.5)["images"][0]
    assert said(again)["task"] == "image-to-image"
    assert said(again)["steps"] == "1", "half of two"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_certificate_signs_every_picture(
    server: TritonServer, signing_server: TritonServer, signer: Identity, protocol: str, kind: str
) -> None:
    fields = {**SMALL, "output_format": kind, "num_images": 2}
    trusted = c2pa.Context.from_dict({**OFFLINE, "trust": {"trust_anchors": signer.authority.read_text()}})
    signed = plain(signing_server, protocol).draw(PROMPT, **fields)["images"]
    unsigned = plain(server, protocol).draw(PROMPT, **fields)["images"]
    for file, other in zip(signed, unsigned, strict=True):
        with c2pa.Reader(f"image/{kind}", io.BytesIO(file), context=trusted) as reader:
            assert reader.get_validation_state() == "Trusted", reader.json()
            assert b"trainedAlgorithmicMedia" in reader.json().encode()
        assert said(file) == said(other)
        assert np.array_equal(pixels(file), pixels(other)), "the signature leaves the picture alone"
        changed = io.BytesIO(with_another_pixel(file, kind))
        with c2pa.Reader(f"image/{kind}", changed, context=trusted) as reader:
            assert reader.get_validation_state() == "Invalid"
            assert "assertion.dataHash.mismatch" in json.dumps(reader.get_validation_results())


def test_raw_pixels_are_pixels_on_a_server_that_signs(server: TritonServer, signing_server: TritonServer) -> None:
    signed, unsigned = (plain(s, "grpc").draw(**SMALL, output_format="raw")["images"] for s in (signing_server, server))
    assert signed[0] == unsigned[0] and len(signed[0]) == 64 * 96 * 3


def test_a_server_that_can_not_sign_does_not_start(tmp_path: Path) -> None:
    made, other = identity(tmp_path), identity(tmp_path / "other")
    options = {"c2pa_certificate": str(made.chain), "c2pa_key": str(other.key)}
    with tempfile.TemporaryFile() as log, TritonServer(REPOSITORY, Ports.free(), bundled(), log, options) as server:
        server.start()
        with pytest.raises(ServerError, match=r"c2pa_key: got .*other/key.pem'; allowed: the key of .*chain.pem"):
            server.wait_ready(READY_S)
