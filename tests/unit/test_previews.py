"""Previews in one process: the files, and what the loop does for them, and does not do when nobody asks."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fluxserve import settings, source
from fluxserve.errors import ServerError
from fluxserve.families import registry
from fluxserve.inflight import CAPACITY, InflightTable
from fluxserve.job import Job
from fluxserve.pipeline import Pipeline, Show, View
from fluxserve.previews import Previews
from fluxserve.sampling import glimpses
from fluxserve.sampling.loop import Loop
from fluxserve.text import Tokenizers
from tests.support import threads
from tests.support.admission import admitted


@pytest.fixture
def table(tmp_path: Path) -> InflightTable:
    return InflightTable(tmp_path / "table")


@pytest.fixture
def previews(table: InflightTable) -> Previews:
    return Previews(InflightTable(table.path))


def files(table: InflightTable) -> list[str]:
    return sorted(file.name for file in table.path.parent.iterdir() if file != table.path)


def test_the_newest_is_kept_and_is_private(table: InflightTable, previews: Previews) -> None:
    table.start(ticket := admitted(table, "a"), 9)
    assert table.want("a", "glimpse", 0)[1] == ticket
    assert previews.get(ticket, "glimpse", 0) == (0, b"")
    previews.put(ticket, "glimpse", 2, b"second", 4)
    previews.put(ticket, "glimpse", 3, b"third\0", 4)
    assert previews.get(ticket, "glimpse", 0) == previews.get(ticket, "glimpse", 2) == (3, b"third\0")
    assert previews.get(ticket, "glimpse", 3) == (0, b""), "nothing later"
    assert previews.get(ticket, "partial", 0) == (0, b"")
    (left,) = files(table)
    assert table.path.with_name(left).stat().st_mode & 0o777 == 0o600
    table.release(ticket)
    previews.drop(ticket)
    assert files(table) == []


def test_a_picture_that_is_late_is_not_kept(table: InflightTable, previews: Previews) -> None:
    table.start(ticket := admitted(table, "a"), 9)
    table.release(ticket)
    previews.put(ticket, "partial", 2, b"late", 4)
    assert files(table) == []


def test_another_request_of_the_same_slot_does_not_see_it(table: InflightTable, previews: Previews) -> None:
    """As after a process that was killed between the two."""
    table.start(ticket := admitted(table, "a"), 9)
    previews.put(ticket, "partial", 2, b"mine", 4)
    assert previews.get(ticket + CAPACITY, "partial", 0) == (0, b"")


def test_a_file_is_no_larger_than_its_pixels(table: InflightTable, previews: Previews) -> None:
    table.start(ticket := admitted(table, "a"), 9)
    with pytest.raises(ServerError, match="preview: 65549 bytes; at most 65548 for 4 pixels"):
        previews.put(ticket, "partial", 1, bytes(65549), 4)
    assert files(table) == []


def test_a_wish_ends_with_its_request(table: InflightTable) -> None:
    table.start(ticket := admitted(table, "a"), 9)
    assert not table.wanted(ticket).any()
    table.want("a", "partial", 4)
    table.want("a", "partial", 2)
    assert table.wanted(ticket).tolist() == [0, 5], "who wants a later one gets it; that serves the other as well"
    table.release(ticket)
    assert table.want("a", "partial", 4)[1] == 0
    slots = set()
    for _ in range(CAPACITY):
        table.start(other := admitted(table), 9)
        slots.add(other % CAPACITY)
        assert not table.wanted(other).any()
        table.release(other)
    assert ticket % CAPACITY in slots


# --- the loop ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Iterator[Pipeline]:
    with threads.one():
        found = source.find(settings.load({}))
        pipeline = Pipeline(found.spec, found.open_components("cpu", "float32"))
        yield pipeline
        pipeline.close()


STEPS = 6


def job(seeds: int = 1, seed: int = 3) -> Job:
    found = source.find(settings.load({}))
    fields = {"prompt": b"a red apple on a blue table", "height": 128, "width": 96, "seed": seed}
    fields |= {"num_inference_steps": STEPS, "num_images": seeds}
    return registry.plan(fields, found.spec, Tokenizers(found.checkpoint))


def drawn(tiny: Pipeline, show: Show = lambda *_: None, seeds: int = 1) -> np.ndarray:
    (drawing,) = tiny.draw([job(seeds)], show=show)
    assert drawing is not None
    return drawing.images


def test_nothing_is_computed_when_nobody_asks(tiny: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("work that nobody asked for")

    for owner, name in ((Loop, "clean"), (View, "glimpse"), (View, "partial"), (glimpses, "project")):
        monkeypatch.setattr(owner, name, fail)
    seen: list[int] = []
    drawn(tiny, lambda job, _: seen.append(job), seeds=2)
    assert seen == [0] * 2 * STEPS


def test_previews_do_not_change_the_picture(tiny: Pipeline) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    pictures = drawn(tiny, lambda _, view: seen.append((view.glimpse(), view.partial())), seeds=2)
    assert np.array_equal(pictures, drawn(tiny, seeds=2))
    downscale = 128 // seen[0][0].shape[0]
    assert {tuple(small.shape) for small, _ in seen} == {(128 // downscale, 96 // downscale, 3)}
    same = [np.array_equal(partial.numpy(), pictures[0]) for _, partial in seen[:STEPS]]
    assert same == [False] * (STEPS - 1) + [True]
    assert np.array_equal(seen[-1][1].numpy(), pictures[1]), "the second picture, while it is drawn"


def test_each_job_of_a_batch_is_shown_its_own(tiny: Pipeline) -> None:
    together = Pipeline(tiny.spec, tiny._engines, max_rows=3)
    seen: dict[int, np.ndarray] = {}

    def show(index: int, view: View) -> None:
        seen[index] = view.partial().numpy()

    off = iter([True] * 5 + [False] * 99)
    drawings = together.draw([job(seed=1), job(seed=2), job(seed=8)], lambda index: index != 2 or next(off), show)
    for index, drawing in enumerate(drawings[:2]):
        assert drawing is not None
        assert np.abs(seen[index].astype(int) - drawing.images[0]).max() <= 2, "another height rounds differently"
    assert drawings[2] is None, "called off at its last step, and not shown that"


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one.astype(float) - other) ** 2)))


def test_estimates_come_nearer(tiny: Pipeline) -> None:
    seen: list[np.ndarray] = []
    (picture,) = drawn(tiny, lambda _, view: seen.append(view.partial().numpy()))
    far = [distance(partial, picture) for partial in seen]
    assert far[0] > far[STEPS // 2] > far[-1] == 0
    assert far[STEPS // 2] < distance(np.full_like(picture, picture.mean()), picture) / 2, "a picture, not noise"


def test_a_glimpse_has_the_colours_of_its_picture(tiny: Pipeline) -> None:
    seen: list[np.ndarray] = []
    (picture,) = drawn(tiny, lambda _, view: seen.append(view.glimpse().numpy()))
    last = seen[-1]
    small = np.asarray(Image.fromarray(picture).resize(last.shape[1::-1], Image.Resampling.BOX))
    plain = np.broadcast_to(small.mean((0, 1)), small.shape)
    assert distance(last, small) < distance(plain, small) / 2
