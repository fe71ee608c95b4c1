"""The `control` model: status and cancel by request id, over the in-flight table. CPU, answers in well under 1 ms.

It exists because an ensemble can't cancel a step that runs, and HTTP can't cancel at all.
"""

import threading
from collections.abc import Sequence
from typing import Any

from fluxserve import contract
from fluxserve.errors import InvalidRequest
from fluxserve.inflight import Status, checked_id
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
            status = self._act(tensors.read_scalars(request, contract.CONTROL))
        except Exception as error:  # noqa: BLE001 (the border: one request's error must not take its neighbours along)
            return triton_errors.response(error)
        return tensors.response(
            contract.CONTROL, {"state": [status.state.encode()], "step": [status.step], "steps": [status.steps]}
        )

    def _act(self, fields: dict[str, Any]) -> Status:
        actions = {"status": self._table.status, "cancel": self._table.cancel}
        action = fields["action"].decode("utf-8", errors="replace")
        if action not in actions:
            raise InvalidRequest("action", repr(action[:40]), ", ".join(actions))
        return actions[action](_request_id(fields["request_id"]))


def _request_id(raw: bytes) -> str:
    try:
        request_id = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("request_id", "bytes that are not UTF-8", "the id a request was sent with") from error
    if not request_id:
        raise InvalidRequest("request_id", "0 bytes", "the id a request was sent with")
    return checked_id(request_id)
