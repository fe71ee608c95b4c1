"""imaging.py: the border where a stranger's bytes are decoded. Pillow and plain arithmetic are the judges."""

import io
import struct
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from fluxserve.errors import InvalidRequest
from fluxserve.families.flux.models import FLUX2_KLEIN_4B
from fluxserve.families.flux.request import _check_reference
from fluxserve.media.images import Fit, InputImage, decode, read_image, write_image
from tests.support.image_files import LIMITS, NOISE, RNG, SMOOTH, UPRIGHT, encoded, pixels, png, refusal


@pytest.mark.parametrize("size", [(1, 1), (1, 33), (33, 1), (17, 33), (64, 64), (3, 1000), (129, 255)])
def test_png_is_exact(size: tuple[int, int]) -> None:
    image = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
    for picture in (image, np.zeros_like(image), image[:, ::-1]):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(write_image(picture, "png", 1)))), picture)


def test_png_is_fast() -> None:
    image = np.kron(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    spent = []
    for _ in range(5):
        begin = time.process_time()
        write_image(image, "png", 90)
        spent.append(time.process_time() - begin)
    assert min(spent) < 0.060, "zlib takes longer than this"


def test_raw_is_the_pixels() -> None:
    assert write_image(NOISE, "raw", 90) == NOISE.tobytes()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_formats(kind: str) -> None:
    small, large = write_image(SMOOTH, kind, 20), write_image(SMOOTH, kind, 95)
    assert len(small) < len(large), "quality counts"
    picture = Image.open(io.BytesIO(large))
    assert picture.format == kind.upper()
    assert np.abs(np.asarray(picture).astype(int) - SMOOTH).mean() < 3


@pytest.mark.parametrize("options", [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_files_are_read_exactly(options: tuple[str, dict[str, Any]]) -> None:
    assert np.array_equal(pixels(encoded(NOISE, options[0], **options[1])), NOISE)


def test_jpeg_is_read_as_pillow_reads_it() -> None:
    data = encoded(SMOOTH, "JPEG", quality=80)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("size", [(100, 80), (500, 640), (1001, 1280)], ids=str)
def test_a_large_jpeg_is_decoded_at_a_fraction(size: tuple[int, int]) -> None:
    """Close to what Lanczos makes of it whole, and the same where it is less than twice as large."""
    waves = np.sin(np.arange(2000)[:, None] / 9) * np.cos(np.arange(2560) / 7)
    picture = Image.fromarray(np.stack([np.uint8(127 + 120 * waves * k) for k in (1, 0.5, -1)], axis=-1))
    data = encoded(picture, "JPEG", quality=95)
    ours = decode(data, Fit(size, size))
    theirs = Image.open(io.BytesIO(data)).resize(size[::-1], Image.Resampling.LANCZOS)
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= (6 if size < (1001, 1280) else 0)


def test_a_jpeg_of_64_megapixels_costs_what_the_model_can_use() -> None:
    data = encoded(Image.new("RGB", (8000, 8000), (9, 80, 200)), "JPEG")
    begin = time.process_time()
    fit = read_image(data, FLUX2_KLEIN_4B.limits).reference(1024 * 1024, 16)
    fraction = decode(data, fit)
    spent = time.process_time() - begin
    begin = time.process_time()
    theirs = Image.open(io.BytesIO(data)).resize(fit.scaled[::-1], Image.Resampling.LANCZOS)
    assert spent < (time.process_time() - begin) / 2
    assert np.array_equal(fraction, np.asarray(theirs))


def test_a_header_is_read_without_the_pixels() -> None:
    """Of the largest file that is taken, in a hundredth of the time that its pixels take."""
    data = encoded(Image.new("RGB", (8000, 8000)), "PNG")
    begin = time.process_time()
    image = read_image(data, LIMITS)
    spent = time.process_time() - begin
    begin = time.process_time()
    decode(data, image.resized(64, 64))
    assert (image.height, image.width) == (8000, 8000)
    assert spent < (time.process_time() - begin) / 100


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(pixels(encoded(NOISE, kind, exif=exif, **options)), UPRIGHT[orientation](NOISE))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_malformed_exif_is_no_internal_error(kind: str) -> None:
    """An EXIF block with an orientation, and a tag whose type and value don't agree."""
    tags = struct.pack(">HHI4s", 0x0112, 3, 1, b"\0\6\0\0") + struct.pack(">HHI4s", 0x014A, 2, 6, b"\0\0\0\x26")
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + tags + b"\0\0\0\0" + b"hello\0"
    with suppress(InvalidRequest):
        pixels(encoded(NOISE, kind, exif=exif))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_over_white(mode: str) -> None:
    picture = Image.fromarray(NOISE).convert(mode)
    alpha = np.linspace(0, 255, 48 * 40).astype(np.uint8).reshape(48, 40)
    picture.putalpha(Image.fromarray(alpha))
    colour = np.asarray(picture.convert("RGB")).astype(float)
    weight = alpha[..., None] / 255
    assert np.abs(pixels(encoded(picture, "PNG")) - (colour * weight + 255 * (1 - weight))).max() <= 1


def test_a_transparent_palette_lies_over_white() -> None:
    picture = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    assert pixels(encoded(picture, "PNG")).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert pixels(encoded(picture, "PNG", transparency=0)).tolist() == [[[255] * 3, [40, 50, 60]]]


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_other_modes(mode: str) -> None:
    picture = Image.fromarray(NOISE).convert(mode)
    assert np.array_equal(pixels(encoded(picture, "PNG")), np.asarray(picture.convert("RGB")))


def test_a_16_bit_grey_png() -> None:
    grey = np.linspace(0, 65535, 48 * 40).astype(np.uint16).reshape(48, 40)
    got = pixels(encoded(Image.fromarray(grey), "PNG"))
    assert np.abs(got[..., 0].astype(int) - (grey >> 8)).max() <= 1


def test_a_16_bit_rgb_png() -> None:
    values = np.array([[[0, 0x8000, 0xFFFF], [0x1234, 0x5678, 0x9ABC]]], dtype=">u2")
    data = png(2, 1, 16, 2, b"\0" + values.tobytes())
    assert np.abs(pixels(data).astype(int) - (values >> 8)).max() <= 1


def test_a_cmyk_jpeg() -> None:
    """Reference: the same picture as an RGB JPEG; CMYK must come out neither inverted nor dark."""
    got = pixels(encoded(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(got.astype(int) - SMOOTH).mean() < 8


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files(kind: str) -> None:
    whole = encoded(NOISE, kind)
    for share in (0.02, 0.2, 0.5, 0.9):
        error = refusal(whole[: int(len(whole) * share)])
        assert "damaged" in error.got or "no known image format" in error.got


@pytest.mark.parametrize(
    ("data", "likely"),
    [
        (b"data:image/png;base64,iVBORw0KGgo", "a data URI: decode its base64"),
        (b"iVBORw0KGgoAAAANSUhEUg", "an image in base64: decode it"),
        (b"\n/9j/4AAQSkZJRgABAQ", "an image in base64: decode it"),
        (b"https://example.com/fox.png", "a URL or a path: send the file's bytes"),
        (b"/home/me/fox.png", "a URL or a path: send the file's bytes"),
        (b"fox.jpeg", "a URL or a path: send the file's bytes"),
        (b"\0\0\0\x1cftypheic", "an AVIF or HEIC file"),
    ],
)
def test_what_is_no_image_is_told_by_its_looks(data: bytes, likely: str) -> None:
    assert refusal(data).got == f"{len(data)} bytes of {likely}"


@pytest.mark.parametrize("data", [b"", b"x", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"\xff\xd8\xff"])
def test_files_that_are_no_images(data: bytes) -> None:
    assert refusal(data).got == f"{len(data)} bytes of no known image format"


@pytest.mark.parametrize(
    ("kind", "likely"),
    [("GIF", "a GIF file"), ("BMP", "a BMP or TIFF file"), ("TIFF", "a BMP or TIFF file")]
    + [(kind, "no known image format") for kind in ("PPM", "ICO")],
)
def test_other_formats_are_not_even_opened(kind: str, likely: str) -> None:
    assert refusal(encoded(NOISE, kind)).got.endswith(f"bytes of {likely}")


def test_damaged_files_never_raise_anything_else() -> None:
    """One byte changed, at many places of the files of every kind; EXIF is another test's business."""
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = bytearray(encoded(NOISE[:12, :12], kind))
        for at in range(0, len(whole), 3):
            for value in (0, 0xFF):
                data = bytes(whole[:at]) + bytes([value]) + bytes(whole[at + 1 :])
                with suppress(InvalidRequest):
                    pixels(data)


@pytest.mark.parametrize(("width", "height"), [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (8001, 8000), (1, 64_000_001)])
def test_a_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    begin = time.process_time()
    assert "pixels" in refusal(png(width, height, 8, 2, b"\0" * 1000)).got
    assert time.process_time() - begin < 0.5, "nothing was decoded"


def test_limits_are_the_models() -> None:
    data = encoded(NOISE, "PNG")
    size = NOISE.shape[0] * NOISE.shape[1]
    assert read_image(data, replace(LIMITS, max_image_pixels=size, max_image_bytes=len(data)))
    assert "at most 64000000 pixels" in refusal(png(8001, 8000, 8, 2, b"")).allowed
    klein, tiny = FLUX2_KLEIN_4B.limits, replace(LIMITS, max_pixels=512 * 512)
    for limits, most in ((klein, 16 * 1024 * 1024), (tiny, 16 * 512 * 512)):
        assert f"at most {most} pixels" in refusal(png(most // 64 + 1, 64, 8, 2, b""), limits).allowed
    assert f"of {size - 1} pixels" not in refusal(data, replace(LIMITS, max_image_pixels=size - 1)).got
    assert refusal(data, replace(LIMITS, max_image_pixels=size - 1)).got == "an image of 40 x 48 pixels"
    error = refusal(data, replace(LIMITS, max_image_bytes=len(data) - 1))
    assert (error.got, error.allowed) == (f"{len(data)} bytes", f"at most {len(data) - 1} bytes")


# --- reference images, against Flux2KleinPipeline's own steps ---------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [(64, 64), (70, 91), (1024, 1024), (1030, 1020), (2000, 1333), (4000, 500), (1025, 1024), (79, 512)],
    ids=str,
)
def test_a_reference_is_that_of_diffusers(size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    data, most = encoded(picture, "PNG", compress_level=0), FLUX2_KLEIN_4B.limits.max_reference_pixels
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    processor.check_image_input(picture)
    if picture.width * picture.height > 1024 * 1024:
        picture = processor._resize_to_target_area(picture, 1024 * 1024)
    height, width = picture.height // 16 * 16, picture.width // 16 * 16
    theirs = processor.preprocess(picture, height=height, width=width, resize_mode="crop")[0].permute(1, 2, 0)
    fit = read_image(data, FLUX2_KLEIN_4B.limits).reference(most, 16)
    ours = decode(data, fit)
    assert ours.shape[:2] == fit.size == (height, width)
    assert torch.equal(2 * (torch.tensor(ours) / 255.0) - 1, theirs)


@pytest.mark.parametrize("size", [(63, 64), (64, 63), (64, 513), (600, 70)], ids=str)
def test_diffusers_refuses_what_a_request_may_not_hold(size: tuple[int, int]) -> None:
    """tests/unit/test_request.py has our own words for it."""
    with pytest.raises(ValueError, match=r"."):
        Flux2ImageProcessor(vae_scale_factor=16).check_image_input(Image.new("RGB", size))
    with pytest.raises(InvalidRequest):
        _check_reference(InputImage(b"", size[1], size[0]), FLUX2_KLEIN_4B.limits, 0, 1)
