"""Clients that speak JSON alone: the KServe protocol over HTTP without its binary extension, in and out."""

import base64
import io
import json
import subprocess
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from fluxserve import contract
from fluxserve.media.images import write_image
from fluxserve.supervisor import TritonServer
from tests.support import programs
from tests.triton.conftest import plain

pytestmark = pytest.mark.xdist_group("triton")

FIELDS: dict[str, object] = {"prompt": "a red apple", "height": 64, "width": 96, "num_inference_steps": 2, "seed": 3}


def body(**fields: object) -> bytes:
    """As KServe's InferenceRESTClient writes a request: tensors as flat lists in JSON, nothing behind it."""
    inputs = [
        {"name": name, "shape": [1], "datatype": contract.FLUX.dtype_of(name), "data": [value]}
        for name, value in fields.items()
    ]
    return json.dumps({"id": "from-json", "inputs": inputs}).encode()


def outputs(answer: bytes) -> dict[str, list[object]]:
    """Strict: JSON is UTF-8 (RFC 8259), and a parser refuses whatever is not."""
    return {output["name"]: output["data"] for output in json.loads(answer.decode("utf-8"))["outputs"]}


def post(server: TritonServer, data: bytes) -> bytes:
    url, headers = f"http://{server.http_url}/v2/models/flux/infer", {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
        return bytes(answer.read())


@pytest.mark.parametrize("output_format", contract.OUTPUT_FORMATS)
def test_images_as_base64(server: TritonServer, output_format: str) -> None:
    """The same bytes as binary ones, in every format."""
    got = outputs(post(server, body(**FIELDS, num_images=2, encoding="base64", output_format=output_format)))
    same = plain(server, "grpc").draw(**FIELDS, num_images=2, output_format=output_format)
    assert [base64.b64decode(str(image), validate=True) for image in got["images"]] == list(same["images"])
    assert (got["seeds"], got["image_size"]) == ([3, 4], [64, 96])
    assert "denoise" in json.loads(str(got["timings"][0]))


def test_binary_images_are_no_json(server: TritonServer) -> None:
    """Why there is an encoding: Triton writes the bytes into the JSON text as they are."""
    with pytest.raises(UnicodeDecodeError):
        outputs(post(server, body(**FIELDS, output_format="jpeg")))


def test_an_input_image_as_base64(server: TritonServer) -> None:
    png = write_image(np.full((64, 96, 3), (200, 40, 90), np.uint8), "png", 90)
    redrawn = {"prompt": "a red apple", "seed": 3, "strength": 0.3}
    text = base64.b64encode(png).decode()
    got = outputs(post(server, body(**redrawn, image=text, encoding="base64")))
    same = plain(server, "http").draw(**redrawn, image=png)
    assert [base64.b64decode(str(image)) for image in got["images"]] == list(same["images"])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_base64_over_the_binary_protocols(server: TritonServer, protocol: str) -> None:
    got = plain(server, protocol).draw(**FIELDS, encoding="BASE64")
    assert Image.open(io.BytesIO(base64.b64decode(got["images"][0]))).size == (96, 64)


def test_an_error_is_json(server: TritonServer) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, body(**FIELDS, encoding="hex"))
    assert caught.value.code == 400
    assert "encoding: got 'hex'; allowed: binary, base64" in json.loads(caught.value.read().decode("utf-8"))["error"]


def test_curl(server: TritonServer) -> None:
    """The README's own line."""
    url = f"http://{server.http_url}/v2/models/flux/infer"
    command = [programs.needed("curl"), "--silent", "--fail", url, "--data-binary", "@-"]
    done = subprocess.run(command, input=body(**FIELDS, encoding="base64"), capture_output=True, check=True)
    (image,) = outputs(done.stdout)["images"]
    assert Image.open(io.BytesIO(base64.b64decode(str(image)))).format == "PNG"
