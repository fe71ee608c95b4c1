"""The `prepare` model: a caller's tensors → validated request → in-flight ticket → job tensors. CPU, n instances.

A full queue costs a caller no more than a look at plain fields. Once a request is admitted, base64 and the headers of
its images are read here, and their pixels in a process beside this one.
"""

import time
from collections.abc import Sequence
from typing import Any

from fluxserve import contract, errors, source
from fluxserve.families import registry
from fluxserve.inflight import HANDOVER_S, checked_id, places
from fluxserve.request import Request
from fluxserve.serving import envelope, tensors
from fluxserve.serving import errors as triton_errors
from fluxserve.serving.decoder import Decoder
from fluxserve.serving.lifecycle import ServedModel
from fluxserve.serving.metrics import RefusalMetrics
from fluxserve.settings import Settings
from fluxserve.text import Tokenizers

_POLL_S = 0.02
_REASONS = (
    (errors.InvalidRequest, "invalid_request"),
    (errors.QueueFull, "queue_full"),
    (errors.ImagesFull, "images_full"),
    (errors.NoRoom, "no_room"),
    (errors.Draining, "draining"),
    (errors.RequestIdInUse, "request_id_in_use"),
    (errors.Cancelled, "cancelled"),
)


class PrepareModel(ServedModel):
    """What Triton calls."""

    name = "prepare"

    def load(self, config: Settings, args: dict[str, str]) -> None:  # noqa: ARG002 (Triton's; not needed here)
        found = source.find(config)
        self._spec, self._tokenizers, self._max_waiting = found.spec, Tokenizers(found.checkpoint), config.max_waiting
        self._family = registry.of(found.spec)
        self._metrics = RefusalMetrics()
        self._decoder = Decoder()

    def unload(self) -> None:
        self._decoder.close()

    def execute(self, requests: Sequence[Any]) -> list[Any] | None:
        """Answer each request, but for those with images: these are answered once the images are decoded."""
        answers = [self._answer(r) for r in requests]
        if None not in answers:
            return answers
        for triton_request, answer in zip(requests, answers, strict=True):
            if answer is not None:
                tensors.send(triton_request.get_response_sender(), answer)
        return None

    def _answer(self, triton_request: Any) -> Any | None:
        """The answer, or None if it is sent later. An image is not looked at before the request has a slot."""
        ticket = None
        try:
            request_id = checked_id(triton_request.request_id())
            draft = self._family.draft(tensors.read_scalars(triton_request, contract.PREPARE), self._spec)
            ticket = self._claim(request_id)
            parsed = draft.complete()
            if not parsed.images:
                return self._admit(parsed, ticket)
            sender, size = triton_request.get_response_sender(), sum(len(image.data) for image in parsed.images)
            submitted = self._decoder.submit(size, lambda: tensors.send(sender, self._admit(parsed, ticket)))
        except Exception as error:  # noqa: BLE001 (the border: one request's error must not take its neighbours along)
            if ticket is not None:
                self._table.release(ticket)
            return self._refusal(error)
        submitted.add_done_callback(triton_errors.report)
        return None

    def _admit(self, parsed: Request, ticket: int) -> Any:
        """Answer a request that has a slot: with a job for `generate`, or the slot is given back."""
        try:
            job = self._family.lay_out(parsed, self._spec, self._tokenizers, self._decoder.decode)
            response = tensors.response(contract.PREPARE, envelope.sealed(job, ticket, parsed))
            self._table.enqueue(ticket, job.steps * len(job.seeds))
        except Exception as error:  # noqa: BLE001 (the border: nobody would hear of it on a thread)
            self._table.release(ticket)
            return self._refusal(error)
        return response

    def _refusal(self, error: Exception) -> Any:
        self._metrics.refused(next((r for cls, r in _REASONS if isinstance(error, cls)), "internal"))
        return triton_errors.response(error)

    def _claim(self, request_id: str) -> int:
        """Claim a slot. A full queue beside an idle GPU is given HANDOVER_S, within which its claims lapse or start."""
        deadline, each = time.monotonic() + HANDOVER_S + _POLL_S, self._processes.seconds_each()
        most = self._max_waiting or places(self._table.queue_timeout_s, each)
        while True:
            try:
                return self._table.claim(request_id, most, each)
            except errors.QueueFull:
                if self._table.drawing or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)
