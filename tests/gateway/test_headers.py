"""A picture's size, read from its header alone: judged against Pillow, on whole files, cut ones and damaged ones."""

from __future__ import annotations

import io
import random
import time
from typing import Any

import pytest
from fluxserve_gateway.headers import size_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.client.fakes import FakeFlux
from tests.gateway.serving import Gateway

SIZES = [(1, 1), (16, 16), (17, 300), (1023, 5), (5, 1023)]
EXIF = Image.Exif()
EXIF[0x010E] = "\xff\xc0 looks like a frame " * 100

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "png": ("PNG", "RGB", {}),
    "png of a palette": ("PNG", "P", {}),
    "png of 16 bits": ("PNG", "I;16", {}),
    "jpeg": ("JPEG", "RGB", {}),
    "jpeg, grey": ("JPEG", "L", {}),
    "jpeg, cmyk": ("JPEG", "CMYK", {}),
    "jpeg, progressive": ("JPEG", "RGB", {"progressive": True}),
    "jpeg with metadata": ("JPEG", "RGB", {"exif": EXIF, "icc_profile": bytes(200_000), "comment": b"\xff\xc1" * 9}),
    "webp": ("WEBP", "RGB", {}),
    "webp, lossless": ("WEBP", "RGB", {"lossless": True}),
    "webp with alpha": ("WEBP", "RGBA", {}),
    "webp with metadata": ("WEBP", "RGB", {"exif": EXIF}),
}


def saved(kind: str, size: tuple[int, int]) -> bytes:
    form, mode, options = KINDS[kind]
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_that_pillow_reads(kind: str) -> None:
    for size in SIZES:
        data = saved(kind, size)
        assert size_of(data) == size == Image.open(io.BytesIO(data)).size


def test_an_animation() -> None:
    file = io.BytesIO()
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    assert size_of(file.getvalue()) == (40, 30)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_has_its_size_or_none(kind: str) -> None:
    data = saved(kind, (17, 300))
    sizes = [size_of(data[:length]) for length in range(min(len(data), 1000))]
    assert set(sizes) <= {None, (17, 300)}
    assert sizes[:20] == [None] * 20


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_raises_nothing(kind: str) -> None:
    data, chance = saved(kind, (17, 300)), random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(4):
            damaged[chance.randrange(min(len(data), 64))] = chance.randrange(256)
        size_of(bytes(damaged))


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(20), b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff\xd8\xff\xd9"])
def test_other_files(data: bytes) -> None:
    assert size_of(data) is None


@pytest.mark.parametrize("segment", [b"\xff\xe0\x00\x02", b"\xff" * 4, b"\xff\x00" * 2, bytes(4)])
def test_a_jpeg_of_segments_alone_takes_no_time(segment: bytes) -> None:
    data = b"\xff\xd8\xff" + segment * (4 << 20)
    begun = time.process_time()
    assert size_of(data) is None
    assert time.process_time() - begun < 1  # 5 ms; to the end it would be seconds


def test_the_texts_of_a_png_may_be_large(gateway: Gateway, fake: FakeFlux) -> None:
    """Programs keep their workflows there. The server takes such a file: the gateway must not refuse it."""
    texts, file = PngInfo(), io.BytesIO()
    texts.add_itxt("workflow", "a" * (3 << 20), zip=True)
    Image.new("RGB", (16, 16)).save(file, "PNG", pnginfo=texts)
    answer = gateway.post("/v1/images/edits", data={"prompt": "a"}, files={"image": file.getvalue()})
    assert answer.status_code == 200, answer.text
    assert list(fake.requests[-1][1]["image"]) == [file.getvalue()]
