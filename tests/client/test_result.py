"""Results: pixels, files, sheets of several."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
from fluxserve_client import Client, MockTransport, Result, Timings
from fluxserve_client.contract import Tensors
from fluxserve_client.pictures import grid, save
from fluxserve_client.result import format_named
from PIL import Image

from tests.client.fakes import FakeFlux

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)  # height 2, width 3


def encoded(format_: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, format_)
    return file.getvalue()


RAW = Result(
    images=(PIXELS.tobytes(),) * 2,
    seeds=(7, 8),
    timings=Timings(queue=1, encode=2, denoise=3, decode=4, total=9, image=1),
    height=2,
    width=3,
    format="raw",
    request_id="x",
)
PNG = dataclasses.replace(RAW, images=(encoded("png"),) * 2, format="png")


@pytest.mark.parametrize("result", [RAW, PNG], ids=["raw", "png"])
def test_pixels(result: Result) -> None:
    assert np.array_equal(result.numpy(1), PIXELS)
    assert result.numpy().dtype == np.uint8
    assert result.pil().size == (3, 2)
    assert (result.image, result.seed) == (result.images[0], 7)
    with pytest.raises(IndexError):
        result.pil(2)


def test_save_writes_what_came(tmp_path: Path) -> None:
    for result, name in ((PNG, "fox.png"), (PNG, "fox"), (RAW, "fox.raw")):
        path = result.save(tmp_path / name, 1)
        assert path.read_bytes() == result.images[1]


def test_save_refuses_a_suffix_that_lies(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path: got 'fox.JPG' for a png picture; ask for output_format='jpeg'"):
        PNG.save(tmp_path / "fox.JPG")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["JPEG", "jpg", "JPG", ".jpg", " Jpeg ", ".jpe"])
@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".jpe", ".jfif"])
def test_every_name_of_a_format(tmp_path: Path, name: str, suffix: str) -> None:
    """What is asked for in one spelling is sent in the contract's, and saved under any suffix of the format."""
    seen: list[bytes] = []

    def server(model: str, inputs: Tensors, request_id: str) -> Tensors:
        seen.append(inputs["output_format"][0])
        return FakeFlux(pictures=(b"\xff\xd8\xffjpeg",)).answer(inputs)

    with Client(transport=MockTransport(server)) as client:
        result = client.generate("a fox", output_format=name)
    assert seen == [b"jpeg"]
    assert result.format == "jpeg"
    assert result.save(tmp_path / f"fox{suffix}").read_bytes() == b"\xff\xd8\xffjpeg"


@pytest.mark.parametrize(("name", "expected"), [("PNG", "png"), ("WebP", "webp"), (".RAW", "raw"), ("gif", "gif")])
def test_other_names_of_formats(name: str, expected: str) -> None:
    assert format_named(name) == expected


@pytest.mark.parametrize(
    ("count", "columns", "size"), [(1, None, (3, 2)), (3, None, (6, 4)), (5, None, (9, 4)), (4, 4, (12, 2))]
)
def test_grid_sizes(count: int, columns: int | None, size: tuple[int, int]) -> None:
    assert grid([PNG.pil()] * count, columns).size == size


def test_grid_puts_pictures_in_reading_order() -> None:
    colours = [(9, 0, 0), (0, 9, 0), (0, 0, 9)]
    sheet = grid([Image.new("RGB", (2, 2), colour) for colour in colours])
    assert [sheet.getpixel(at) for at in ((0, 0), (2, 0), (0, 2), (2, 2))] == [*colours, (0, 0, 0)]


def test_grid_wants_equal_sizes() -> None:
    with pytest.raises(ValueError, match="pictures of one size"):
        grid([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))])
    with pytest.raises(ValueError, match="one or more"):
        grid([])


def test_save_a_sheet(tmp_path: Path) -> None:
    for name, format_ in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.webp", "WEBP")):
        save(PNG.pil(), tmp_path / name, quality=50)
        assert Image.open(tmp_path / name).format == format_
    with pytest.raises(ValueError, match="expected a name ending in"):
        save(PNG.pil(), tmp_path / "a.raw")
