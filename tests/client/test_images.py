"""What is sent for an `image`: the pixels that a viewer shows, from whatever Pillow holds or a file has."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fluxserve_client.images import file_of
from PIL import Image, ImageCms

RED, BLUE = (200, 40, 40), (30, 60, 220)
LUMA = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in (RED, BLUE)]


def two_halves() -> Image.Image:
    """Red at the left, blue at the right; wider than high."""
    picture = Image.new("RGB", (32, 16), RED)
    picture.paste(BLUE, (16, 0, 32, 16))
    return picture


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def shown(data: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The colours in the middle of the halves of a file that was sent, laid over white."""
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and picture.mode in ("L", "LA", "RGB", "RGBA")
    assert picture.size == (32, 16), "upright"
    rgba = picture.convert("RGBA")
    over_white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return tuple(over_white.getpixel((8, 8))), tuple(over_white.getpixel((24, 8)))


def close(got: tuple[tuple[int, ...], ...], expected: tuple[tuple[int, ...], ...], tolerance: int = 3) -> bool:
    return bool(np.abs(np.array(got) - np.array(expected)).max() <= tolerance)


UPRIGHT = {
    1: lambda p: p,
    2: lambda p: p.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    3: lambda p: p.transpose(Image.Transpose.ROTATE_180),
    4: lambda p: p.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    5: lambda p: p.transpose(Image.Transpose.TRANSPOSE),
    6: lambda p: p.transpose(Image.Transpose.ROTATE_90),
    7: lambda p: p.transpose(Image.Transpose.TRANSVERSE),
    8: lambda p: p.transpose(Image.Transpose.ROTATE_270),
}
"""How the sensor saw a picture that an orientation makes upright."""


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_phones_picture_is_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "phone"
    UPRIGHT[orientation](two_halves()).save(path, kind, exif=exif)
    assert close(shown(file_of("image", Image.open(path))), (RED, BLUE), 12)
    loaded = Image.open(path)
    loaded.load()
    assert close(shown(file_of("image", loaded)), (RED, BLUE), 12)


def half_transparent(mode: str) -> Image.Image:
    picture = two_halves().quantize(2) if mode == "P" else two_halves().convert(mode)
    alpha = Image.new("L", (32, 16), 255)
    alpha.paste(0, (16, 0, 32, 16))
    picture.putalpha(alpha)
    return picture


def palette(**options: Any) -> Image.Image:
    """Two colours, through a file, with what that says of transparency."""
    picture = two_halves().quantize(2)
    first = picture.getpixel((24, 8))
    return Image.open(io.BytesIO(encoded(picture, "PNG", **({"transparency": first} if options else {}))))


def deep(mode: str) -> Image.Image:
    grey = np.asarray(two_halves().convert("L")).astype(np.uint16) * 257
    if mode == "I":
        return Image.fromarray(grey.astype(np.int32))
    return Image.fromarray(grey.astype("<u2" if mode == "I;16" else ">u2"))


def colour_key() -> Image.Image:
    return Image.open(io.BytesIO(encoded(two_halves(), "PNG", transparency=BLUE)))


GREY = ((LUMA[0],) * 3, (LUMA[1],) * 3)
WHITE = (255, 255, 255)
MODES: dict[str, tuple[Callable[[], Image.Image], tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "RGB": (two_halves, (RED, BLUE)),
    "L": (lambda: two_halves().convert("L"), GREY),
    "1": (lambda: two_halves().convert("L").point(lambda v: 255 * (v > LUMA[1]), "1"), (WHITE, (0, 0, 0))),
    "P": (palette, (RED, BLUE)),
    "P, transparent": (lambda: palette(transparency=True), (RED, WHITE)),
    "RGB, colour key": (colour_key, (RED, WHITE)),
    "RGBA": (lambda: half_transparent("RGBA"), (RED, WHITE)),
    "RGBa": (lambda: half_transparent("RGBA").convert("RGBa"), (RED, WHITE)),
    "LA": (lambda: half_transparent("LA"), (GREY[0], WHITE)),
    "La": (lambda: half_transparent("LA").convert("La"), (GREY[0], WHITE)),
    "PA": (lambda: half_transparent("P"), (RED, WHITE)),
    "RGBX": (lambda: two_halves().convert("RGBX"), (RED, BLUE)),
    "CMYK": (lambda: two_halves().convert("CMYK"), (RED, BLUE)),
    "YCbCr": (lambda: two_halves().convert("YCbCr"), (RED, BLUE)),
    "HSV": (lambda: two_halves().convert("HSV"), (RED, BLUE)),
    "LAB": (
        lambda: ImageCms.profileToProfile(
            two_halves(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        ),
        (RED, BLUE),
    ),
    "I;16": (lambda: deep("I;16"), GREY),
    "I;16B": (lambda: deep("I;16B"), GREY),
    "I": (lambda: deep("I"), GREY),
    "F": (lambda: two_halves().convert("F"), GREY),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_sent_as_it_looks(mode: str) -> None:
    make, expected = MODES[mode]
    assert close(shown(file_of("image", make())), expected, 4)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000"])
def test_files_of_other_formats_become_png(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture"
    two_halves().save(path, kind)
    assert close(shown(file_of("image", path)), (RED, BLUE), 12)
    assert file_of("image", path.read_bytes()) == file_of("image", path)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [two_halves(), Image.new("RGB", (32, 16), "green")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert close(shown(file_of("image", Image.open(io.BytesIO(data)))), (RED, BLUE), 12)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_the_server_reads_goes_as_it_is(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(two_halves(), kind, exif=exif)
    (tmp_path / "file").write_bytes(data)
    text = base64.b64encode(data).decode()
    wrapped = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    for given in (data, bytearray(data), memoryview(data), tmp_path / "file", text, text.encode(), wrapped):
        assert file_of("image", given) == data
    for uri in (f"data:image/{kind.lower()};base64,{text}", f"data:image/x;charset=utf-8;base64,{text}"):
        assert file_of("image", uri) == file_of("image", uri.encode()) == data


@pytest.mark.parametrize("text", ["iVBORw0KGgo=!", "data:image/png;base64,iVBORw0KGgoAA"])
def test_damaged_base64(text: str) -> None:
    with pytest.raises(ValueError, match="image: damaged base64"):
        file_of("image", text)


@pytest.mark.parametrize(
    "text", ["", "fox.png", "/tmp/fox.png", "http://x/fox.png", "data:text/plain,hello", "data:image/svg+xml,<svg/>"]
)
def test_other_text_is_refused_by_what_it_is(text: str) -> None:
    with pytest.raises(TypeError, match=r"image: got the text .*, expected a pathlib\.Path, or base64; URLs are not"):
        file_of("image", text)


@pytest.mark.parametrize("data", [b"", b"\x00bytes\x00", b"GIF89a", b"BM" + bytes(60), b"%!PS-Adobe\n"])
def test_what_is_no_picture_is_the_servers_to_judge(data: bytes) -> None:
    assert file_of("image", data) == data


def test_a_damaged_file_behind_an_open_picture() -> None:
    data = encoded(two_halves(), "PNG")
    with pytest.raises((ValueError, OSError)):
        file_of("image", Image.open(io.BytesIO(data[:60])))


def swapped_profile() -> bytes:
    """sRGB with the primaries of red and blue exchanged: no viewer can miss it."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {
        bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * struct.unpack(">I", profile[128:132])[0], 12)
    }
    red, blue = tags[b"rXYZ"], tags[b"bXYZ"]
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_profile_travels_with_its_colours(kind: str) -> None:
    profile = swapped_profile()
    data = encoded(two_halves(), kind, icc_profile=profile)
    sent = Image.open(io.BytesIO(file_of("image", Image.open(io.BytesIO(data)))))
    assert sent.info["icc_profile"] == profile


def test_a_profile_of_ink_does_not() -> None:
    data = encoded(two_halves().convert("CMYK"), "JPEG", icc_profile=swapped_profile(), quality=95)
    sent = file_of("image", Image.open(io.BytesIO(data)))
    assert "icc_profile" not in Image.open(io.BytesIO(sent)).info
    assert close(shown(sent), (RED, BLUE), 12)
