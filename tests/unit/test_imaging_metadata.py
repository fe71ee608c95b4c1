"""What an image file says beside its pixels: animations, absurd metadata, long texts, colour profiles."""

import io
import struct
import time
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms

from fluxserve.errors import InvalidRequest
from fluxserve.media.images import read_image
from fluxserve.media.png.texts import without_texts
from tests.support.image_files import LIMITS, NOISE, RNG, UPRIGHT, chunk, encoded, pixels, png


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.fromarray(np.full_like(NOISE, v)) for v in (200, 10)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert (pixels(data) == 200).all()


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 10**8)),
        chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"\0" * 10**8)),
        chunk(b"iCCP", b"k\0\0" + zlib.compress(b"\0" * 10**8)),
        chunk(b"tEXt", b"\0"),
        chunk(b"gAMA", b"\0\0\0\0"),
        chunk(b"pHYs", b""),
        chunk(b"tRNS", b"\0"),
    ],
    ids=["zTXt bomb", "iTXt bomb", "iCCP bomb", "empty tEXt", "zero gamma", "empty pHYs", "short tRNS"],
)
def test_absurd_metadata(extra: bytes) -> None:
    """Taken without it or refused, in no time: a text that unpacks to 100 MB is not unpacked."""
    begin = time.process_time()
    with suppress(InvalidRequest):
        assert read_image(png(1, 1, 8, 2, b"\0\1\2\3", extra), LIMITS).width == 1
    assert time.process_time() - begin < 0.5


def workflow(count: int) -> bytes:
    """Text that hardly compresses, as ComfyUI's workflows with pictures in them."""
    return RNG.integers(32, 127, count, dtype=np.uint8).tobytes()


TEXTS = {
    "tEXt": lambda text: chunk(b"tEXt", b"workflow\0" + text),
    "zTXt": lambda text: chunk(b"zTXt", b"workflow\0\0" + zlib.compress(text)),
    "iTXt": lambda text: chunk(b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(text)),
    "iTXt, plain": lambda text: chunk(b"iTXt", b"workflow\0\0\0\0\0" + text),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_a_picture_with_megabytes_of_text_is_drawn(kind: str) -> None:
    """Before the pixels, after them, and in many chunks."""
    text = TEXTS[kind](workflow(3_000_000))
    whole = encoded(NOISE, "PNG")
    head, tail = whole[:33], whole[33:]
    many = b"".join(TEXTS[kind](workflow(300_000)) for _ in range(20))
    for data in (head + text + tail, whole[:-12] + text + whole[-12:], head + many + tail):
        assert np.array_equal(pixels(data), NOISE)


def test_texts_that_hold_an_orientation_are_heeded() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    whole = encoded(NOISE, "PNG")
    data = whole[:33] + TEXTS["zTXt"](workflow(3_000_000)) + text + whole[33:]
    assert np.array_equal(pixels(data), UPRIGHT[6](NOISE))


def test_text_is_taken_out_of_whole_chunks_only() -> None:
    whole = encoded(NOISE[:4, :4], "PNG")
    data = whole[:33] + TEXTS["tEXt"](b"x" * 50) + whole[33:]
    assert without_texts(data) == whole
    for untouched in (whole, b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff" + data, whole[:40]):
        assert without_texts(untouched) == untouched
    for end in range(len(data)):
        assert len(without_texts(data[:end])) <= end


def swapped() -> bytes:
    """sRGB with red and blue exchanged in the profile: as wrong as colours can be without it."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    tags = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * count, 12)}
    for old, new in ((b"rXYZ", b"bXYZ"), (b"bXYZ", b"rXYZ")):
        profile[tags[old] : tags[old] + 4] = new
    at, size = struct.unpack(">II", profile[tags[b"desc"] + 4 : tags[b"desc"] + 12])
    text = bytes(profile[at : at + size]).replace("sRGB".encode("utf-16-be"), "BGRs".encode("utf-16-be"))
    return bytes(profile[:at]) + text + bytes(profile[at + size :])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_colour_profile_is_heeded(kind: str) -> None:
    flat = Image.new("RGB", (32, 32), (220, 60, 30))
    got = pixels(encoded(flat, kind, icc_profile=swapped()))[16, 16]
    assert np.abs(got.astype(int) - (30, 60, 220)).max() <= 6


def test_a_profile_beside_transparency_and_palettes() -> None:
    clear = Image.new("RGBA", (4, 4), (220, 60, 30, 0))
    assert (pixels(encoded(clear, "PNG", icc_profile=swapped())) == 255).all()
    few = Image.new("RGB", (4, 4), (220, 60, 30)).quantize(2)
    assert np.abs(pixels(encoded(few, "PNG", icc_profile=swapped()))[0, 0].astype(int) - (30, 60, 220)).max() <= 3
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(pixels(encoded(NOISE, "PNG", icc_profile=srgb)), NOISE), "nothing to convert"


def test_a_grey_or_ink_profile_on_other_pixels_is_not() -> None:
    cmyk = swapped()[:16] + b"CMYK" + swapped()[20:]
    assert np.array_equal(pixels(encoded(NOISE, "PNG", icc_profile=cmyk)), NOISE)


def test_damaged_profiles_are_as_none() -> None:
    """One byte changed, at many places; and a profile that is larger than any."""
    profile = swapped()
    for at in [*range(0, 132), *range(132, len(profile), 7)]:
        for value in (0, 0xFF):
            bad = profile[:at] + bytes([value]) + profile[at + 1 :]
            assert pixels(encoded(NOISE[:4, :4], "PNG", icc_profile=bad)).shape == (4, 4, 3)
    bomb = chunk(b"iCCP", b"k\0\0" + zlib.compress(b"\0" * 10**8))
    assert np.array_equal(pixels(png(1, 1, 8, 2, b"\0\1\2\3", bomb)), [[[1, 2, 3]]])
