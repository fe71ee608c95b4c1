"""png/strips.py: files that any reader takes, the same on any number of threads. Pillow and zlib are the judges."""

import io
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from fluxserve.media.png import strips

RNG = np.random.default_rng(0)
STRIP_ROWS = strips._STRIP_BYTES // (3 * 1024)


def noise(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def photo(side: int) -> np.ndarray:
    """Gradients with the grain of a camera."""
    y, x = np.mgrid[:side, :side] / 80
    return (128 + 100 * np.sin(x)[..., None] * np.cos(y)[..., None] + RNG.normal(0, 1.5, (side, side, 3))).astype(
        np.uint8
    )


def chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and body of each, its checksum looked at."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    at = 8
    while at < len(file):
        (size,) = struct.unpack_from(">I", file, at)
        named, (crc,) = file[at + 4 : at + 8 + size], struct.unpack_from(">I", file, at + 8 + size)
        assert zlib.crc32(named) == crc
        yield named[:4], named[4:]
        at += size + 12


@pytest.mark.parametrize(
    ("height", "width"),
    [
        *[(1, 1), (1, 2), (2, 1), (7, 5), (3, 70_000), (3000, 100), (1000, 1016)],
        *[(STRIP_ROWS, 1024), (STRIP_ROWS + 1, 1024), (2 * STRIP_ROWS - 1, 1024)],
    ],
)
def test_the_file_is_whole_and_exact(height: int, width: int) -> None:
    """One zlib stream with its checksum, nothing behind it; and Pillow sees the pixels."""
    for pixels in (
        noise(height, width),
        np.zeros((height, width, 3), np.uint8),
        np.full((height, width, 3), 255, np.uint8),
    ):
        file = strips.encode(pixels)
        found = list(chunks(file))
        assert [kind for kind, _ in found if kind != b"IDAT"] == [b"IHDR", b"IEND"]
        stream = zlib.decompressobj()
        rows = stream.decompress(b"".join(body for kind, body in found if kind == b"IDAT"))
        assert stream.eof and not stream.unused_data and len(rows) == height * (1 + 3 * width)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), pixels)


def test_pixels_that_lie_apart_in_memory() -> None:
    whole = noise(300, 2048)
    for pixels in (whole[:, ::2], whole[::-1], whole[:, :, ::-1], whole.transpose(1, 0, 2), whole[:, 100:900]):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(strips.encode(pixels)))), pixels)


def test_the_bytes_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = photo(1000)
    files = set()
    for threads in (1, 2, 5):
        with ThreadPoolExecutor(threads) as pool:
            monkeypatch.setattr(strips, "_pool", lambda pool=pool: pool)
            files.add(strips.encode(pixels))
    assert len(files) == 1


def test_many_at_once() -> None:
    """Callers share the pool; none of them waits for a thread that waits."""
    pictures = [noise(256, 1024) for _ in range(12)]
    with ThreadPoolExecutor(len(pictures)) as callers:
        files = list(callers.map(strips.encode, pictures, timeout=60))
    for file, picture in zip(files, pictures, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), picture)


def test_files_are_small() -> None:
    """Noise grows by two thousandths at most; a photograph takes no more than zlib's level 1 makes of the same rows."""
    pixels = noise(1024, 1024)
    assert len(strips.encode(pixels)) < 1.002 * pixels.nbytes
    pixels = photo(1024)
    up = np.diff(pixels.reshape(1024, -1), axis=0, prepend=np.zeros((1, 3 * 1024), np.uint8))
    assert len(strips.encode(pixels)) < len(zlib.compress(up.tobytes(), 1))
