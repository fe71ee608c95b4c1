"""png: filter, count and pack a picture, and the files that come of it. zlib and Pillow are the judges."""

import io
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from fluxserve.kernels.image.png_stream import NONE, RUN, SYMBOLS, pack, plain_pack, plain_symbols_of, symbols_of
from fluxserve.media.png import gpu, huffman, strips
from fluxserve.media.png.container import text
from tests.kernels.judge import DEVICE
from tests.unit.test_png import chunks

SIZES = [(1, 1), (1, 2), (2, 1), (7, 5), (16, 16), (3, 500), (40, 36), (64, 96)]


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))


def flat(height: int, width: int) -> torch.Tensor:
    return torch.full((height, width, 3), 37, dtype=torch.uint8)


def smooth(height: int, width: int) -> torch.Tensor:
    """Gradients with a little grain, and a flat field in their middle."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grain = torch.randn(height, width, 3, generator=torch.Generator().manual_seed(height))
    picture = 128 + 90 * torch.stack([torch.sin(x / 30), torch.cos(y / 40), torch.sin((x + y) / 50)], dim=-1) + grain
    picture[height // 4 : height // 2, : width // 2] = 200
    return picture.clamp(0, 255).to(torch.uint8)


PICTURES = [noise, flat, smooth, lambda h, w: torch.zeros(h, w, 3, dtype=torch.uint8)]


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_symbols_and_bits_are_the_references(picture, height: int, width: int) -> None:
    pixels = picture(height, width).to(DEVICE)
    symbols, counts = symbols_of(pixels)
    plain, plain_counts = plain_symbols_of(pixels)
    assert torch.equal(symbols, plain) and torch.equal(counts, plain_counts)
    table = torch.arange(SYMBOLS, dtype=torch.int32, device=DEVICE) % 2**12 | 12 << 24
    table[RUN], table[NONE] = (2**19 - 3) | 19 << 24, 0
    size = (19 * len(symbols)) // 32 + 9
    words, expected = (torch.zeros(size, dtype=torch.int32, device=DEVICE) for _ in range(2))
    words[0] = expected[0] = -1 & 0x7FFFF
    pack(symbols, table, words, 19)
    plain_pack(plain, table, expected, 19)
    assert torch.equal(words, expected)


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_file_is_whole_and_exact(picture, height: int, width: int) -> None:
    pixels = picture(height, width)
    file = gpu.encode(pixels.to(DEVICE))
    found = list(chunks(file))
    assert [kind for kind, _ in found if kind != b"IDAT"] == [b"IHDR", b"IEND"]
    stream = zlib.decompressobj()
    filtered = stream.decompress(b"".join(body for kind, body in found if kind == b"IDAT"))
    assert stream.eof and not stream.unused_data, "the checksum is right, and nothing follows"
    assert len(filtered) == height * (1 + 3 * width)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(file))), pixels.numpy())


@pytest.mark.parametrize("picture", [smooth, noise])
def test_files_are_no_larger_than_the_other_writers(picture) -> None:
    pixels = picture(128, 160)
    assert len(gpu.encode(pixels.to(DEVICE))) < 1.01 * len(strips.encode(pixels.numpy())) + 200


def test_texts_stand_behind_the_header() -> None:
    """The host puts them there; what the GPU wrote is the same without."""
    pixels, texts = smooth(16, 16).to(DEVICE), text("parameters", "Steps: 4")
    with_texts, without = gpu.encode(pixels, texts), gpu.encode(pixels)
    assert with_texts == without[:33] + texts + without[33:]
    assert Image.open(io.BytesIO(with_texts)).text == {"parameters": "Steps: 4"}


def test_runs_save_what_is_flat() -> None:
    """A row begins with the filter's byte, so that some of its zeros always stand alone."""
    assert len(gpu.encode(flat(128, 256).to(DEVICE))) < 128 * 3 * 256 / 30


@pytest.mark.skipif(DEVICE == "cpu", reason="minutes without a GPU")
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize(("height", "width"), [(1024, 1024), (2048, 2048), (1000, 1016)])
def test_large_ones(picture, height: int, width: int) -> None:
    pixels = picture(height, width)
    first, again = (gpu.encode(pixels.to(DEVICE)) for _ in range(2))
    assert first == again, "additions may come in any order"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first))), pixels.numpy())


def test_codes_are_no_longer_than_deflate_takes() -> None:
    """Counts like Fibonacci's make the longest codes: 40 symbols, 39 bits."""
    counts = [1, 1]
    while len(counts) < 40:
        counts.append(counts[-1] + counts[-2])
    lengths = huffman.lengths(counts)
    assert max(lengths) <= huffman.LONGEST
    assert sum(2.0**-length for length in lengths) == 1


def test_codes_by_hand() -> None:
    """RFC 1951's own example: A to H with lengths 3 3 3 3 3 2 4 4 have the codes 010 011 100 101 110 00 1110 1111."""
    codes = huffman.codes([3, 3, 3, 3, 3, 2, 4, 4])
    expected = ["010", "011", "100", "101", "110", "00", "1110", "1111"]
    assert codes == [int(code[::-1], 2) for code in expected]
    assert huffman.lengths([4, 0, 2, 1, 1]) == [1, 0, 2, 3, 3]
