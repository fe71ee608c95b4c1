"""The process that decodes images: what it gives, what ends it, and with whom it ends."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fluxserve import process
from fluxserve.errors import DecoderLost, ImagesFull, InvalidRequest
from fluxserve.media.images import Fit, write_image
from fluxserve.serving import decoder
from fluxserve.serving.decoder import Decoder
from tests.triton.conftest import wait_for

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
PNG = write_image(PIXELS, "png", 90)
WHOLE = Fit((64, 96), (64, 96))


@pytest.fixture
def decoding() -> Iterator[Decoder]:
    made = Decoder()
    yield made
    made.close()
    assert not process.started(made._process.pid)


def test_pixels_and_errors_come_back(decoding: Decoder) -> None:
    for _ in range(2):
        assert np.array_equal(decoding.decode(PNG, WHOLE), PIXELS)
        assert np.array_equal(decoding.decode(PNG, Fit((64, 96), (48, 64))), PIXELS[8:56, 16:80])
        with pytest.raises(
            InvalidRequest, match=r"image: got a damaged or truncated PNG file .*; allowed: a whole file"
        ):
            decoding.decode(PNG[:-3000], WHOLE)
        with pytest.raises(InvalidRequest, match="0 bytes of no known image format"):
            decoding.decode(b"", WHOLE)


def test_a_decoder_that_dies_is_one_requests_error(decoding: Decoder) -> None:
    os.kill(decoding._process.pid, signal.SIGSTOP)
    killer = threading.Timer(0.2, decoding._process.kill)
    killer.start()
    with pytest.raises(DecoderLost, match="ended with status -9 at a file of"):
        decoding.decode(PNG, WHOLE)
    assert np.array_equal(decoding.decode(PNG, WHOLE), PIXELS)


def test_a_decoder_that_does_not_come_back_is_ended(decoding: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "TIMEOUT_S", 0.3)
    os.kill(decoding._process.pid, signal.SIGSTOP)
    with pytest.raises(DecoderLost):
        decoding.decode(PNG, WHOLE)
    monkeypatch.undo()
    assert np.array_equal(decoding.decode(PNG, WHOLE), PIXELS)


def test_large_files_wait_for_room(decoding: Decoder) -> None:
    """One request may be larger than what all of them may have together; another is not let in beside it."""
    go, done = threading.Event(), list[int]()
    decoding.submit(2 * decoder.MAX_BYTES, go.wait)
    with pytest.raises(ImagesFull):
        decoding.submit(1, lambda: None)
    go.set()
    decoding._thread.submit(lambda: None).result()
    decoding.submit(1, lambda: done.append(1))
    decoding._thread.submit(lambda: None).result()
    assert done == [1]


PARENT = """
import time
from fluxserve.serving.decoder import Decoder
print(Decoder()._process.pid, flush=True)
time.sleep(60)
"""


def test_it_ends_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert process.started(child)
        parent.kill()
    wait_for(lambda: not process.started(child))
