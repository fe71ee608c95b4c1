"""device.py: on a CPU nothing waits; on a GPU the host stays two steps ahead. Events are counted, not timed."""

import time
from typing import ClassVar

import pytest
import torch

from fluxserve import device
from fluxserve.device import DeviceClock, Pacer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Event:
    """A CUDA event without a GPU: its time is the number of its record."""

    made: ClassVar[list["Event"]] = []
    records = 0

    def __init__(self, timed: bool = False) -> None:
        self.timed, self.at, self.waited_for = timed, None, False
        Event.made.append(self)

    def record(self) -> None:
        Event.records += 1
        self.at = Event.records

    def synchronize(self) -> None:
        assert self.at is not None, "waits for what was never recorded"
        self.waited_for = True

    def elapsed_time(self, other: "Event") -> float:
        assert self.timed and other.timed
        assert other.waited_for or Event.made[-1].waited_for, "read before it is there"
        return float(other.at - self.at)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    monkeypatch.setattr(device, "_event", Event)
    Event.made, Event.records = [], 0
    return Event.made


def test_a_cpu_is_not_paced(events: list[Event]) -> None:
    pacer = Pacer(CPU)
    for _ in range(5):
        pacer.step()
    assert events == []


def test_a_gpu_is_two_steps_behind_at_most(events: list[Event]) -> None:
    pacer = Pacer(GPU)
    for step in range(1, 20):
        pacer.step()
        assert len(Event.made) == step
        waited = [e.waited_for for e in Event.made]
        assert waited == [True] * (step - 2) + [False] * min(2, step), "two are on their way, no more and no fewer"


def test_the_hosts_clock() -> None:
    clock = DeviceClock(CPU)
    for name in ("b", "a", "b"):
        with clock.stage(name):
            time.sleep(0.005)
    total = clock.milliseconds()
    assert list(total) == ["b", "a"], "in the order of their first appearance"
    assert 5 <= total["a"] <= total["b"] and total["b"] >= 10
    assert total == clock.milliseconds()


def test_the_devices_clock(events: list[Event]) -> None:
    clock = DeviceClock(GPU)
    for name in ("encode", "denoise", "encode"):
        with clock.stage(name):
            assert not any(e.waited_for for e in Event.made), "nothing waits before it is asked"
    assert clock.milliseconds() == {"encode": 2.0, "denoise": 1.0}
    assert Event.made[-1].waited_for


def test_a_clock_that_saw_nothing() -> None:
    assert DeviceClock(CPU).milliseconds() == DeviceClock(GPU).milliseconds() == {}


@pytest.mark.parametrize("where", [CPU, GPU])
def test_a_stage_lets_errors_through(where: torch.device, events: list[Event]) -> None:
    clock = DeviceClock(where)
    with pytest.raises(KeyError), clock.stage("encode"):
        raise KeyError
    assert clock.milliseconds() == {}
