"""The soak's own judgement: which requests it sends, and that each broken promise is seen."""

import asyncio
import io
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from fluxserve_client import Result, Timings
from PIL import Image

from benchmarks.soak.callers import Outcome, flaw
from benchmarks.soak.cases import ABANDONED, BAD, FORMATS, IN_USE, WAYS, Case, Shape, cases, references
from benchmarks.soak.footprint import MIB, Footprint, growth
from benchmarks.soak.promises import Promise, promises
from benchmarks.soak.run import _meanwhile, _still_live
from fluxserve.errors import InvalidRequest
from fluxserve.families.flux.models import TINY
from fluxserve.media.images import decode
from tests.support.jobs import parse

MANY = 4000


def test_the_sequence_depends_on_the_seed_alone() -> None:
    first, again, other = (list(islice(cases(seed, Shape()), 50)) for seed in (3, 3, 4))
    assert first == again
    assert [c.fields for c in first] != [c.fields for c in other]


def test_the_mix() -> None:
    sent = list(islice(cases(0, Shape()), MANY))
    kinds = Counter(case.kind for case in sent)
    assert kinds["abandoned"] / MANY == pytest.approx(ABANDONED, rel=0.2)
    assert kinds["bad"] / MANY == pytest.approx(BAD, rel=0.2)
    assert {c.what for c in sent if c.kind == "abandoned"} == set(WAYS)
    assert {c.protocol for c in sent} == {"grpc", "http"}
    assert {c.fields["output_format"] for c in sent if c.kind == "good"} == set(FORMATS)
    assert {c.what for c in sent if c.kind == "good"} == {"", *(c.what for c in references(Shape()))}
    assert {IN_USE, "prompt", "image", "seed"} <= {c.what for c in sent if c.kind == "bad"}
    assert any("image" in c.fields for c in sent if c.kind == "good")


@pytest.mark.parametrize("seed", [0, 3])
def test_good_requests_are_good_and_bad_ones_bad(seed: int) -> None:
    """By the server's own judgement, without a server: it would be blamed for the soak's mistakes."""
    for case in islice(cases(seed, Shape()), 1000):
        fields = {name: value.encode() if isinstance(value, str) else value for name, value in case.fields.items()}
        if "image" in fields:
            fields["image"] = [fields["image"]]
        if case.kind == "bad" and case.what != IN_USE:
            with pytest.raises(InvalidRequest, match=f"^{case.what}: "):
                judge(fields)
        else:
            judge(fields)


def judge(fields: dict[str, Any]) -> None:
    """What `prepare` does to a request: a damaged image is noticed when it is decoded."""
    request = parse(fields, TINY)
    for image in request.images:
        decode(image.data, image.resized(request.height, request.width))


def result(images: list[bytes], seeds: tuple[int, ...] = (5,)) -> Result:
    return Result(tuple(images), seeds, Timings(0, 0, 0, 0, 0, 0), 64, 96, "png", "")


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


ASKED = {"width": 96, "height": 64, "seed": 5, "output_format": "png"}


@pytest.mark.parametrize(
    ("answer", "asked", "said"),
    [
        (result([png(96, 64)]), ASKED, ""),
        (result([png(64, 96)]), ASKED, "(64, 96)"),
        (result([png(96, 64)]), ASKED | {"output_format": "jpeg"}, "a PNG"),
        (result([png(96, 64)], (6,)), ASKED, "seeds (6,)"),
        (result([png(96, 64)]), ASKED | {"num_images": 2}, "1 images"),
        (result([bytes(10)]), ASKED | {"output_format": "raw"}, "10 bytes of RGB"),
        (result([bytes(3 * 96 * 64)]), ASKED | {"output_format": "raw"}, ""),
    ],
)
def test_an_answer_is_looked_at(answer: Result, asked: dict[str, object], said: str) -> None:
    assert said in flaw(answer, asked)
    assert bool(said) == bool(flaw(answer, asked))


def outcome(kind: str, ended: str, wrong: str = "") -> Outcome:
    return Outcome(Case(1, kind, "", "grpc", {}), ended, 1.0, wrong)


GOOD = [outcome("good", "answered"), outcome("bad", "refused"), outcome("abandoned", "gave up")]


def broken(judged: list[Promise]) -> list[str]:
    return [promise.text for promise in judged if promise.broken]


def test_all_is_well() -> None:
    judged = promises(3, GOOD, [], [], None)
    assert broken(judged) == []
    assert [p.verdict for p in judged[-3:]] == ["not looked at"] * 3


def test_a_server_of_another_machine_is_not_looked_at() -> None:
    judged = promises(3, GOOD, [], asyncio.run(_still_live(None)), None)
    assert [p.verdict for p in judged[-4:]] == ["not looked at"] * 4


def test_memory_that_was_never_sampled_is_not_flat() -> None:
    unseen = cast("Footprint", SimpleNamespace(samples=[], restarted=list))
    assert [p.verdict for p in promises(3, GOOD, [], [], unseen)[-3:]] == ["held", "BROKEN", "BROKEN"]


def test_what_runs_beside_the_load_ends_with_it() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # what it still has to do
            ended.append("ended")

    async def load(error: Exception | None) -> None:
        async with _meanwhile(endless()):
            await asyncio.sleep(0)
            if error:
                raise error

    asyncio.run(load(None))
    with pytest.raises(ConnectionError):
        asyncio.run(load(ConnectionError()))
    assert ended == ["ended"] * 2


def test_an_error_beside_the_load_is_raised() -> None:
    async def broken_sample() -> None:
        raise OSError("no /proc")

    async def load() -> None:
        async with _meanwhile(broken_sample()):
            await asyncio.sleep(0.01)

    with pytest.raises(OSError, match="no /proc"):
        asyncio.run(load())


@pytest.mark.parametrize(
    ("sent", "outcomes", "different", "live", "promise"),
    [
        (0, [], [], [], "load"),
        (4, GOOD, [], [], "lost"),
        (4, [*GOOD, outcome("good", "lost", "no answer")], [], [], "lost"),
        (4, [*GOOD, outcome("good", "ServerError", "ServerError: x")], [], [], "good requests"),
        (4, [*GOOD, outcome("bad", "answered", "it was answered")], [], [], "bad requests"),
        (4, [*GOOD, outcome("abandoned", "ServerError", "x")], [], [], "abandoned"),
        (3, GOOD, ["reference 0"], [], "same bytes"),
        (3, GOOD, [], ["1 requests"], "in flight"),
    ],
)
def test_a_broken_promise_is_seen(
    sent: int, outcomes: list[Outcome], different: list[str], live: list[str], promise: str
) -> None:
    (text,) = broken(promises(sent, outcomes, different, live, None))
    assert promise in text


def test_growth_compares_early_with_late() -> None:
    assert growth([100 * MIB] * 20) == (100 * MIB, 100 * MIB)
    early, late = growth([k * MIB for k in range(100)])
    assert (early, late) == (29 * MIB + MIB // 2, 89 * MIB + MIB // 2)
    assert growth([7]) == (7, 7)


def test_a_process_that_ends_is_seen(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        table = SimpleNamespace(path=tmp_path / "nothing-inflight")
        footprint = Footprint(SimpleNamespace(pid=process.pid, table=table))
        footprint.sample()
        assert footprint.first.keys() == {process.pid}
        assert footprint.samples[0].rss > MIB
        assert footprint.restarted() == []
        process.kill()
        process.wait()
        assert footprint.restarted() == [f"{process.pid} is gone"]
