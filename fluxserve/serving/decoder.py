"""A process that decodes images, so that neither their time nor a crash in a codec is anybody else's.

One for each instance of `prepare`, which goes on with requests that have no image. Files and pixels go through pipes
as they are, because whatever decodes a stranger's bytes must not have its answers unpickled. It ends when its input
does, which is when its parent ends.
"""

import json
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fluxserve.errors import DecoderLost, ImagesFull, InvalidRequest
from fluxserve.media import images as imaging
from fluxserve.media.images import Fit, Pixels

MAX_REQUESTS = 16
"""Requests with images that one instance of `prepare` holds, the one that is being decoded included."""

MAX_BYTES = 256 * 2**20
"""Of those requests' files; one request alone may have more."""

TIMEOUT_S = 30.0
"""Many times what the largest image takes: whatever takes longer is not coming back."""

_REQUEST = struct.Struct("<Q4I")  # bytes of the file that follows, Fit.scaled, Fit.size
_ANSWER = struct.Struct("<?Q")  # whether pixels follow, or else JSON; bytes
_SCRIPT = """
import os, sys
os.nice(10)
sys.path.insert(0, sys.argv[1])
from fluxserve.serving import decoder
decoder.main()
"""
"""Requests without images go before it on a busy CPU, too."""


class Decoder:
    """The process, and the thread that talks to it: requests with images go through it one after the other."""

    def __init__(self) -> None:
        self._process = _start()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="image")
        self._lock, self._requests, self._bytes = threading.Lock(), 0, 0

    def submit(self, size: int, work: Callable[[], None]) -> "Future[None]":
        """Run `work`, which may call `decode`, on the decoder's thread. `size` is that of its files, in bytes.

        Raises:
            ImagesFull: too many requests, or too large ones, are here already.
        """
        with self._lock:
            full = self._requests >= MAX_REQUESTS or self._bytes + size > MAX_BYTES
            if self._requests and full:
                raise ImagesFull(self._requests, self._bytes)
            self._requests, self._bytes = self._requests + 1, self._bytes + size

        def leave(_: "Future[None]") -> None:
            with self._lock:
                self._requests, self._bytes = self._requests - 1, self._bytes - size

        submitted = self._thread.submit(work)
        submitted.add_done_callback(leave)
        return submitted

    def decode(self, data: bytes, fit: Fit) -> Pixels:
        """imaging.decode, in the process.

        Raises:
            InvalidRequest: the file is damaged.
            DecoderLost: the process ended or was ended; the next call starts another.
        """
        if self._process.poll() is not None:
            self._end()
            self._process = _start()
        watchdog = threading.Timer(TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            return self._ask(data, fit)
        except (OSError, struct.error) as error:  # a pipe that broke, an answer that broke off
            self._process.kill()
            raise DecoderLost(len(data), self._process.wait()) from error
        finally:
            watchdog.cancel()

    def _ask(self, data: bytes, fit: Fit) -> Pixels:
        assert self._process.stdin is not None and self._process.stdout is not None
        for part in (_REQUEST.pack(len(data), *fit.scaled, *fit.size), data):
            self._process.stdin.write(part)
        self._process.stdin.flush()
        decoded, size = _ANSWER.unpack(self._process.stdout.read(_ANSWER.size))
        shape = (*fit.size, 3)
        if decoded and size != np.prod(shape):
            raise OSError(f"{size} bytes for an image of {shape}")
        answer = self._process.stdout.read(size)
        if len(answer) != size:
            raise OSError(f"{len(answer)} of {size} bytes")
        if not decoded:
            raise InvalidRequest("image", *json.loads(answer))
        return np.frombuffer(answer, np.uint8).reshape(shape)

    def close(self) -> None:
        """Finish what was submitted, and end the process."""
        self._thread.shutdown()
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.communicate()


def _start() -> "subprocess.Popen[bytes]":
    command = [sys.executable or "python3", "-P", "-c", _SCRIPT, str(Path(__file__).parents[2])]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def main() -> None:
    """Decode what comes on the standard input until it ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while head := source.read(_REQUEST.size):
        length, *sizes = _REQUEST.unpack(head)
        try:
            pixels = imaging.decode(source.read(length), Fit((sizes[0], sizes[1]), (sizes[2], sizes[3])))
            answer = (True, pixels.tobytes())
        except InvalidRequest as error:
            answer = (False, json.dumps([error.got, error.allowed]).encode())
        sink.write(_ANSWER.pack(answer[0], len(answer[1])))
        sink.write(answer[1])
        sink.flush()
