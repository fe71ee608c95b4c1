"""Requests in the in-flight table as `prepare` leaves them."""

from fluxserve.inflight import InflightTable


def admitted(table: InflightTable, request_id: str = "") -> int:
    """Claim a slot and queue it; returns the ticket."""
    ticket = table.claim(request_id)
    table.enqueue(ticket, 1)
    return ticket
