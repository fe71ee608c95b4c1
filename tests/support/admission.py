"""Requests in the in-flight table as `prepare` leaves them, and a clock for it."""

from fluxserve.inflight import InflightTable, Status


def admitted(table: InflightTable, request_id: str = "") -> int:
    """Claim a slot and queue it; returns the ticket."""
    ticket = table.claim(request_id)
    table.enqueue(ticket, 1)
    return ticket


UNKNOWN = Status("unknown", 0, 0)


class Clock:
    """Nanoseconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 10**15

    def __call__(self) -> int:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)
