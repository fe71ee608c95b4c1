"""Who gets in: inner models called directly, against the live server."""

import secrets
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from fluxserve import contract, process
from fluxserve.media.images import decode, read_image
from fluxserve.spec import Limits
from fluxserve.supervisor import TritonServer
from tests.triton.conftest import PATIENCE, PlainClient, plain, running, wait_for

pytestmark = pytest.mark.xdist_group("triton")

SMALL = {"prompt": "a fox", "height": 64, "width": 64, "num_inference_steps": 4}


def job(client: PlainClient, **fields: object) -> dict[str, np.ndarray]:
    """What `prepare` answers to a direct call: tensors for `generate`, with a ticket that was never used."""
    return client.call("prepare", {**SMALL, **fields})


def forge(tensors: dict[str, np.ndarray], ticket: int) -> dict[str, np.ndarray]:
    """The same job with another ticket."""
    arrays = {**load(tensors["job"][0].tobytes()), "ticket": np.array([ticket])}
    return {**tensors, "job": np.frombuffer(save(arrays), np.uint8)[None]}


@pytest.mark.parametrize("ticket", [0, 1, -1, 300, 2**62 + 5])
def test_generate_refuses_a_ticket_that_nobody_was_given(client: PlainClient, ticket: int) -> None:
    forged = forge(job(client), ticket)
    status, message = client.refused(lambda: client.call("generate", forged))
    assert status == "INVALID_ARGUMENT"
    assert f"ticket: got {ticket}, which no waiting request has" in message
    assert "clients call `flux`" in message


def test_a_ticket_is_for_one_use(client: PlainClient) -> None:
    given = job(client)
    assert len(client.call("generate", given)["images"]) == 1, "what the ensemble does, by hand"
    status, message = client.refused(lambda: client.call("generate", given))
    assert (status, "which no waiting request has" in message) == ("INVALID_ARGUMENT", True)


def test_guessed_tickets_cancel_nobody(server: TritonServer) -> None:
    """Small numbers, then random ones, ahead of everybody by priority, while others wait and run."""
    client = plain(server, "grpc")
    forged = job(client)
    guesses = [*range(300), *(secrets.randbits(63) for _ in range(50))]
    with running(client, "ahead") as ahead, ThreadPoolExecutor(8) as good, ThreadPoolExecutor(8) as bad:
        waiting = [good.submit(client.call, "flux", SMALL, f"good-{k}") for k in range(8)]
        wait_for(lambda: client.control("good-7", "status")[0] == "queued")

        def attack(ticket: int) -> str:
            tensors = forge(forged, ticket)
            return client.refused(lambda: client.call("generate", tensors, priority=1))[0]

        attacks = [bad.submit(attack, ticket) for ticket in guesses]
        client.control("ahead", "cancel")
        ahead.result(PATIENCE)
        assert [len(w.result(PATIENCE)["images"]) for w in waiting] == [1] * 8
        assert {a.result(PATIENCE) for a in attacks} == {"INVALID_ARGUMENT"}


def test_direct_calls_of_prepare_keep_nobody_out(server: TritonServer) -> None:
    """As many as may wait, beside an idle GPU, and again while good requests are drawn: not one of those is refused."""
    client = plain(server, "grpc")
    for _ in range(2):
        for _ in range(contract.MAX_WAITING):
            job(client)
        with ThreadPoolExecutor(4) as pool:
            drawn = list(
                pool.map(lambda k: client.call("flux", SMALL | {"seed": k, "num_inference_steps": 1}), range(12))
            )
        assert [len(d["images"]) for d in drawn] == [1] * 12


def test_what_never_reaches_generate_is_forgotten(server: TritonServer) -> None:
    client = plain(server, "grpc")
    client.call("prepare", SMALL, "lost")
    assert client.control("lost", "status")[0] == "queued"
    wait_for(lambda: client.control("lost", "status")[0] == "unknown")
    wait_for(lambda: server.table.live() == 0)


# --- what stays ------------------------------------------------------------------------------------------------------


def used(server: TritonServer) -> int:
    """Bytes of this process's servers in shared memory."""
    return sum(f.stat().st_blocks * 512 for f in Path("/dev/shm").glob(f"{process.own_prefix()}*"))


def test_refused_requests_take_what_one_of_them_takes(server: TritonServer) -> None:
    """An instance of `prepare` keeps room for the largest request that it had, and never for a second one."""
    client, size, before = plain(server, "grpc"), 40 * 2**20, used(server)
    for _ in range(12):
        status, message = client.refused(lambda: client.call("flux", SMALL | {"image": bytes(size)}))
        assert (status, f"image: got {size} bytes" in message) == ("INVALID_ARGUMENT", True)
    assert used(server) - before <= 2 * (size + 3 * 2**20)


def test_files_are_the_servers_users_alone(server: TritonServer) -> None:
    """The table's and the folders'; test_private_memory.py looks at Triton's own."""
    assert server.table.path.stat().st_mode & 0o777 == 0o600
    folders = list(Path("/dev/shm").glob(f"{process.own_prefix()}*home-*"))
    assert folders
    assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}


# --- pictures that take long to decode -------------------------------------------------------------------------------


@cache
def heavy() -> bytes:
    """As many pixels as the model takes, 16 bits deep, with alpha: half a megabyte that unpacks to 34."""
    side = 2048
    row = b"\4" + np.arange(4 * side, dtype=">u2").tobytes()
    head = struct.pack(">IIBBBBB", side, side, 16, 6, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(row * side, 1)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def seconds(work: Callable[[], object]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def test_requests_without_a_picture_pass_those_that_are_decoded(server: TritonServer) -> None:
    """Eight heavy files at once, through both instances of `prepare`, and a request that has none."""
    client = plain(server, "grpc")
    plainly, redrawn = SMALL | {"num_inference_steps": 1}, SMALL | {"image": heavy(), "strength": 0.01}
    client.call("flux", plainly)
    with ThreadPoolExecutor(8) as pool:
        pictures = [pool.submit(client.call, "flux", redrawn, f"heavy-{k}") for k in range(8)]
        wait_for(lambda: all(client.control(f"heavy-{k}", "status")[0] != "unknown" for k in range(8)))
        client.call("flux", plainly)
        passed = sum(not picture.done() for picture in pictures)
        assert all(len(picture.result(PATIENCE)["images"]) == 1 for picture in pictures)
    assert passed >= 4, "it came last, and two decoders were at work"


def test_a_refusal_costs_the_same_whatever_the_picture(server: TritonServer) -> None:
    client = plain(server, "grpc")
    image = read_image(heavy(), Limits(min_side=64, max_side=512, max_pixels=512 * 512))
    decoding = min(seconds(lambda: decode(heavy(), image.resized(64, 64))) for _ in range(3))
    with running(client, "hog") as hog:
        waiting = [server.table.claim(f"filler-{k}") for k in range(contract.MAX_WAITING)]
        try:
            without = min(seconds(lambda: is_refused(client, SMALL)) for _ in range(5))
            beside = min(seconds(lambda: is_refused(client, SMALL | {"image": heavy()})) for _ in range(5))
        finally:
            for ticket in waiting:
                server.table.release(ticket)
        client.control("hog", "cancel")
        hog.result(PATIENCE)
    assert beside < without + decoding / 3, decoding


def is_refused(client: PlainClient, fields: dict[str, object]) -> None:
    assert client.refused(lambda: client.call("flux", fields))[0] == "UNAVAILABLE"
