"""The `control` model: status, cancel and previews by request id, over the in-flight table.

On the CPU; status and cancel are answered in well under 1 ms.

It exists because an ensemble can't cancel a step that runs, and HTTP can't cancel at all.
"""

import base64
import threading
from collections.abc import Sequence
from typing import Any

from fluxserve import contract
from fluxserve.errors import InvalidRequest
from fluxserve.inflight import PREVIEWS, Status, checked_id
from fluxserve.previews import Previews
from fluxserve.serving import errors as triton_errors
from fluxserve.serving import tensors
from fluxserve.serving.lifecycle import ServedModel
from fluxserve.serving.metrics import QueueMetrics
from fluxserve.settings import Settings

_LOOK_S = 0.5
"""Between two looks at the table: far more often than metrics are read."""


class ControlModel(ServedModel):
    """What Triton calls."""

    name = "control"

    def load(self, config: Settings, args: dict[str, str]) -> None:  # noqa: ARG002 (Triton's; not needed here)
        self._previews = Previews(self._table)
        self._metrics, self._ended = QueueMetrics(), threading.Event()
        self._gauges = threading.Thread(target=self._watch, name="gauges", daemon=True)
        self._gauges.start()

    def unload(self) -> None:
        self._ended.set()
        self._gauges.join()

    def _watch(self) -> None:
        """Show how many requests are in flight, whenever that has changed."""
        shown = None
        while not self._ended.wait(_LOOK_S):
            if (counts := self._table.counts()) != shown:
                self._metrics.see(*counts)
                shown = counts

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer(r) for r in requests]

    def _answer(self, request: Any) -> Any:
        try:
            status, step, image = self._act(tensors.read_scalars(request, contract.CONTROL))
            said = {"state": [status.state.encode()], "step": [status.step], "steps": [status.steps]}
            return tensors.response(contract.CONTROL, {**said, "preview": [image], "preview_step": [step]})
        except Exception as error:  # noqa: BLE001 (the border: one request's error must not take its neighbours along)
            return triton_errors.response(error)

    def _act(self, fields: dict[str, Any]) -> tuple[Status, int, bytes]:
        """Return the status, and the step and file of a preview where one is asked for."""
        actions = {"status": self._status, "cancel": self._cancel, "preview": self._preview}
        action = _word("action", fields, tuple(actions))
        return actions[action](_request_id(fields["request_id"]), fields)

    def _status(self, request_id: str, _: dict[str, Any]) -> tuple[Status, int, bytes]:
        return self._table.status(request_id), 0, b""

    def _cancel(self, request_id: str, _: dict[str, Any]) -> tuple[Status, int, bytes]:
        return self._table.cancel(request_id), 0, b""

    def _preview(self, request_id: str, fields: dict[str, Any]) -> tuple[Status, int, bytes]:
        """Answer with a picture that is there, and have the next one drawn: later than `after` in either case."""
        kind = _word("kind", {"kind": PREVIEWS[0].encode(), **fields}, PREVIEWS)
        encoding = _word("encoding", {"encoding": contract.ENCODINGS[0].encode(), **fields}, contract.ENCODINGS)
        after = int(fields.get("after", 0))
        if after < 0:
            raise InvalidRequest("after", str(after), "0 or more")
        status, ticket = self._table.want(request_id, kind, after)
        step, image = self._previews.get(ticket, kind, after) if ticket else (0, b"")
        return status, step, base64.b64encode(image) if encoding == "base64" else image


def _word(name: str, fields: dict[str, Any], allowed: tuple[str, ...]) -> str:
    word: str = fields[name].decode("utf-8", errors="replace")
    if word not in allowed:
        raise InvalidRequest(name, repr(word[:40]), ", ".join(allowed))
    return word


def _request_id(raw: bytes) -> str:
    try:
        request_id = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("request_id", "bytes that are not UTF-8", "the id a request was sent with") from error
    if not request_id:
        raise InvalidRequest("request_id", "0 bytes", "the id a request was sent with")
    return checked_id(request_id)
