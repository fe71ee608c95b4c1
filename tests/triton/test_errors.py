"""Every bad request: one error with the field, what came and what is allowed; and the server goes on."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fluxserve.supervisor import TritonServer
from tests.triton.conftest import PlainClient, counters, plain, wait_for

pytestmark = pytest.mark.xdist_group("triton")


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert("RGB").save(file, "PNG")
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 60,000 × 60,000 black pixels: ten gigabytes once decoded, a few hundred bytes here."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b"")
    )


def big_bomb() -> bytes:
    """Below Pillow's own alarm, above our limit."""
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    return file.getvalue()


SIDES = "a multiple of 16 from 64 to 512"
BAD = {
    "empty prompt": ({"prompt": ""}, "prompt", "0 bytes", "1 to 4096 bytes"),
    "blank prompt": ({"prompt": " \n"}, "prompt", "no text", "1 to 4096 bytes"),
    "100 KB prompt": ({"prompt": "a" * 102_400}, "prompt", "102400 bytes", "1 to 4096 bytes"),
    "invalid UTF-8": ({"prompt": b"a \xff\xfe fox"}, "prompt", "not UTF-8 (at byte 2)", "UTF-8 text"),
    "NUL": ({"prompt": b"a\x00b"}, "prompt", "a NUL character", "UTF-8 text"),
    "height 0": ({"height": 0}, "height", "got 0", SIDES),
    "height -16": ({"height": -16}, "height", "got -16", SIDES),
    "width 17": ({"width": 17}, "width", "got 17", SIDES),
    "width 100,000": ({"width": 100_000}, "width", "got 100000", SIDES),
    "NaN guidance": ({"guidance_scale": float("nan")}, "guidance_scale", "nan", "a finite number"),
    "infinite guidance": ({"guidance_scale": float("inf")}, "guidance_scale", "inf", "a finite number"),
    "0 steps": ({"num_inference_steps": 0}, "num_inference_steps", "got 0", "1 to 100"),
    "101 steps": ({"num_inference_steps": 101}, "num_inference_steps", "got 101", "1 to 100"),
    "seed -2": ({"seed": -2}, "seed", "got -2", "-1 (draw one) or 0 to"),
    "seed overflow": ({"seed": 2**63 - 1, "num_images": 2}, "seed", str(2**63 - 1), f"0 to {2**63 - 2}"),
    "9 images": ({"num_images": 9}, "num_images", "got 9", "1 to 8"),
    "strength 0": ({"image": png(), "strength": 0.0}, "strength", "got 0.0", "0 < strength <= 1"),
    "strength NaN": ({"image": png(), "strength": float("nan")}, "strength", "nan", "0 < strength <= 1"),
    "strength alone": ({"strength": 0.5}, "strength", "got 0.5", "only beside an image"),
    "scale alone": ({"true_cfg_scale": 4.0}, "true_cfg_scale", "got 4.0", "beside a negative_prompt"),
    "no scale": ({"negative_prompt": "cat"}, "negative_prompt", "got 3 bytes", "only beside a true_cfg_scale"),
    "unknown format": ({"output_format": "bmp"}, "output_format", "'bmp'", "png, jpeg, webp, raw"),
    "quality 0": ({"quality": 0}, "quality", "got 0", "1 to 100"),
    "no image": ({"image": b"what is this"}, "image", "12 bytes of no known image format", "PNG, JPEG, WEBP"),
    "truncated PNG": ({"image": png()[:-300]}, "image", "a damaged or truncated PNG", "a whole file"),
    "a GIF": ({"image": b"GIF89a" + bytes(20)}, "image", "26 bytes of a GIF file", "PNG, JPEG, WEBP"),
    "bomb": ({"image": bomb()}, "image", "far too many pixels", "at most 4194304 pixels"),
    "smaller bomb": ({"image": big_bomb()}, "image", "9000 x 9000", "at most 4194304 pixels"),
    "unknown encoding": ({"encoding": "hex"}, "encoding", "'hex'", "binary, base64"),
    "no base64": ({"image": png(), "encoding": "base64"}, "image", "not base64", "base64, as encoding says"),
    "wrong dtype": ({"height": np.array([64.0], np.float32)}, "height", "FP32", "INT32"),
    "wrong rank": ({"height": np.array([[64]], np.int32)}, "height", "[1,1]", "[1]"),
    "two values": ({"seed": np.array([1, 2], np.int64)}, "seed", "[2]", "[1]"),
}


TRITONS_OWN = ("wrong dtype", "wrong rank", "two values")
"""Refused by Triton itself, against the config.pbtxt, before any model is asked."""


@pytest.mark.parametrize("case", BAD)
def test_bad_request(client: PlainClient, case: str) -> None:
    fields, name, got, allowed = BAD[case]
    status, message = client.refused(lambda: client.draw(**{"prompt": "a fox", **fields}))
    assert status == "INVALID_ARGUMENT"
    for part in (name, got, allowed):
        assert part in message
    assert "Traceback" not in message


def test_unknown_input(client: PlainClient) -> None:
    status, message = client.refused(lambda: client.call("flux", {"prompt": "a fox", "action": "x"}))
    assert status == "INVALID_ARGUMENT"
    assert "action" in message


def test_missing_prompt(client: PlainClient) -> None:
    status, message = client.refused(lambda: client.call("flux", {"height": 64}))
    assert status == "INVALID_ARGUMENT"
    assert "prompt" in message


@pytest.mark.parametrize("fields", [{"request_id": "x", "action": "stop"}, {"request_id": "", "action": "status"}])
def test_bad_control(client: PlainClient, fields: dict[str, object]) -> None:
    status, message = client.refused(lambda: client.call("control", fields))
    assert status == "INVALID_ARGUMENT"
    assert "action: got 'stop'; allowed: status, cancel" in message or "request_id: got 0 bytes" in message


def test_the_server_goes_on(server: TritonServer) -> None:
    """A good request right after every kind of bad one, and not one of them reached the loop."""
    client = plain(server, "http")
    before = counters(server)
    for fields, *_ in BAD.values():
        client.refused(lambda fields=fields: client.draw(**{"prompt": "a fox", **fields}))
    after = counters(server)
    assert after["fluxserve_steps_total"] == before["fluxserve_steps_total"]
    reason = 'fluxserve_rejected_requests_total{reason="invalid_request"}'
    assert after[reason] - before[reason] == len(BAD) - len(TRITONS_OWN)
    assert client.draw(height=64, width=64, num_inference_steps=1)["images"].shape == (1,)
    assert server.is_ready()
    wait_for(lambda: server.table.live() == 0)  # claims of other tests that nobody followed up lapse with an idle GPU
