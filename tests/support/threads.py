"""torch's threads in tests."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one() -> Iterator[None]:
    """Small tensors on a busy machine: OpenMP's threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
