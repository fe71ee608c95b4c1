"""What must be true after a soak, each as a sentence and what contradicts it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.soak.callers import Outcome
from benchmarks.soak.footprint import MIB, Footprint, growth

GROWTH = 0.05
RSS_SLACK = 64 * MIB
SHARED_SLACK = 16 * MIB
"""Memory may grow by this share and these bytes, from the second fifth of the time to the last."""

_EXAMPLES = 5


@dataclass(frozen=True)
class Promise:
    """broken: what contradicts it; empty where it holds. None where nobody could look: another machine's server."""

    text: str
    broken: Sequence[str] | None

    @property
    def verdict(self) -> str:
        return "not looked at" if self.broken is None else "BROKEN" if self.broken else "held"


def promises(
    sent: int,
    outcomes: Sequence[Outcome],
    different: Sequence[str],
    still_live: Sequence[str] | None,
    footprint: Footprint | None,
) -> list[Promise]:
    """Judge a soak.

    Args:
        sent: how many requests were begun.
        different: reference requests whose bytes changed.
        still_live: requests that the server holds although nobody waits any more; None if nobody could look.
    """
    lost = [_line(o) for o in outcomes if o.ended == "lost"]
    if sent != len(outcomes):
        lost.append(f"{sent} requests were sent and {len(outcomes)} ended")
    wrong = [o for o in outcomes if o.wrong and o.ended != "lost"]
    good = [o for o in outcomes if o.case.kind == "good"]
    return [
        Promise("there was load", [] if good else ["no good request was sent"]),
        Promise("nothing is lost: every request ends", lost),
        Promise("good requests are answered, as requested", _of(wrong, "good")),
        Promise("bad requests are refused, by the field at fault", _of(wrong, "bad")),
        Promise("abandoned requests end as cancelled, or were answered before", _of(wrong, "abandoned")),
        Promise("the same request has the same bytes at the end", different),
        Promise("nothing is in flight afterwards", still_live),
        Promise("no process ended or came", footprint.restarted() if footprint else None),
        Promise("resident memory is flat", _flat(footprint, lambda w: [s.rss for s in w.samples], RSS_SLACK)),
        Promise("shared memory is flat", _flat(footprint, lambda w: [s.shared for s in w.samples], SHARED_SLACK)),
    ]


def _flat(footprint: Footprint | None, values: Callable[[Footprint], list[int]], slack: int) -> list[str] | None:
    if footprint is None:
        return None
    if not footprint.samples:
        return ["no sample was taken"]
    early, late = growth(values(footprint))
    most = early * (1 + GROWTH) + slack
    return [f"{early / MIB:.0f} MiB grew to {late / MIB:.0f} MiB; bound {most / MIB:.0f}"] if late > most else []


def _of(wrong: Sequence[Outcome], kind: str) -> list[str]:
    return [_line(o) for o in wrong if o.case.kind == kind]


def _line(outcome: Outcome) -> str:
    case = outcome.case
    return (
        f"number {case.number} ({case.kind} {case.what}, {case.protocol}, {dict(case.fields)!r:.200}): {outcome.wrong}"
    )


def as_json(judged: Sequence[Promise]) -> Mapping[str, object]:
    return {p.text: {"verdict": p.verdict, "examples": list(p.broken or ())[:_EXAMPLES]} for p in judged}
