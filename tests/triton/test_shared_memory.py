"""A server whose /dev/shm is too small for an answer: a small tmpfs of its own, in a mount namespace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import namespaces
from tests.triton.conftest import PlainClient, plain, serving

pytestmark = pytest.mark.xdist_group("triton")

SHM = Path("/dev/shm")
SIZE = 6 * 2**20
"""Four processes take 1 MiB each, the table 60 KiB; a raw picture of 256 x 256 has 192 KiB."""

RAW = {"prompt": "a fox", "height": 256, "width": 256, "num_inference_steps": 1, "output_format": "raw"}
PATIENCE_S = 60.0
"""Of the client: an answer that never comes is an error of another kind."""


def attempt(client: PlainClient, images: int) -> list[str]:
    """A status and a message; or OK and the sizes of the images."""
    try:
        files = client.call("flux", RAW | {"num_images": images}, client_timeout=PATIENCE_S)["images"]
    except Exception as error:  # noqa: BLE001 (what kind it is, the test says)
        return [str(error)]
    return ["OK", *(str(len(file)) for file in files)]


def inside() -> None:
    """Run by the test below, with a /dev/shm of SIZE bytes. Prints what each request got."""
    with serving() as server:
        client = plain(server, "grpc")
        got = [attempt(client, images) for images in (4, 8, 4)]
        filler = SHM / "filler"
        filler.write_bytes(bytes(namespaces.free(SHM) - 4096))
        got += [attempt(client, 4)]
        filler.unlink()
        print(json.dumps([*got, [str(server.exit_status()), str(server.table.live())]]))


def test_an_answer_without_room_is_an_error_and_not_a_silence() -> None:
    program = [sys.executable, "-c", "from tests.triton.test_shared_memory import inside; inside()"]
    done = subprocess.run(
        namespaces.command(SHM, SIZE, program), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    few, many, again, full, state = json.loads(done.stdout.splitlines()[-1])
    assert few == again == ["OK", *[str(256 * 256 * 3)] * 4]
    assert full == few, "with no room to grow, it goes through the memory that is there"
    (message,) = many
    assert "UNAVAILABLE" in message
    assert int(message.split("answer: it has ")[1].split()[0]) > 8 * 256 * 256 * 3
    assert "Ask for fewer or smaller images" in message and "--shm-size" in message
    assert state == ["None", "0"]
