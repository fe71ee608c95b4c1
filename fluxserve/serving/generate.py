"""The `generate` model: job tensors → pixels. The only model that owns a GPU; one process each, one batch at a time."""

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fluxserve import checkpoint, contract, settings
from fluxserve.engines.open import open_components
from fluxserve.errors import Cancelled
from fluxserve.job import Job
from fluxserve.pipeline import Drawing, Pipeline
from fluxserve.serving import errors as triton_errors
from fluxserve.serving import tensors
from fluxserve.serving.inflight import NO_TICKET, InflightTable
from fluxserve.serving.metrics import DrawingMetrics


@dataclass(frozen=True)
class _Admitted:
    """A request of the batch that was still wanted when its turn came."""

    place: int
    request: Any
    job: Job
    ticket: int
    waited: float


class GenerateModel:
    """What Triton calls."""

    def initialize(self, args: dict[str, str]) -> None:
        config = settings.load(json.loads(args["model_config"])["parameters"])
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        folder = checkpoint.read(config.checkpoint_path)
        components = open_components(config.engine, folder, device, config.dtype)
        self._pipeline = Pipeline(folder.spec, components, device, config.max_rows)
        self._table = InflightTable(config.inflight_path)
        self._table.register_worker()
        self._metrics = DrawingMetrics()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer a batch. Triton batches by shape; what differs in schedule all the same is drawn one after another."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[tuple[object, ...], list[_Admitted]] = defaultdict(list)
        for place, request in enumerate(requests):
            try:
                admitted = self._admit(place, request)
                groups[admitted.job.likeness].append(admitted)
            except Exception as error:  # noqa: BLE001 (the border: one request's error must not take its neighbours along)
                responses[place] = self._refuse(error)
        for group in groups.values():
            for admitted, response in zip(group, self._draw(group), strict=True):
                responses[admitted.place] = response
        return responses

    def finalize(self) -> None:
        self._pipeline.close()

    def _admit(self, place: int, request: Any) -> _Admitted:
        arrays = tensors.read(request, contract.GENERATE)
        job = Job(
            clip_ids=arrays["clip_ids"][0],
            t5_ids=arrays["t5_ids"][0],
            pixels=arrays["pixels"][0],
            sigmas=arrays["sigmas"][0],
            guidance=float(arrays["guidance"][0, 0]),
            noise_seeds=tuple(int(seed) for seed in arrays["noise_seeds"][0]),
        )
        ticket = int(arrays["ticket"][0, 0])
        waited = 0.0 if ticket == NO_TICKET else self._table.start(ticket, job.steps * len(job.noise_seeds))
        return _Admitted(place, request, job, ticket, waited)

    def _draw(self, group: Sequence[_Admitted]) -> list[Any]:
        """Draw requests of one likeness; their slots are given back whatever happens."""
        try:
            drawings = self._pipeline.draw([a.job for a in group], lambda index: self._stepped(group[index]))
            return [self._answer(a, drawing) for a, drawing in zip(group, drawings, strict=True)]
        except Exception as error:  # noqa: BLE001 (the border: Triton would answer a raise with a bare traceback)
            return [self._refuse(error) for _ in group]
        finally:
            for admitted in group:
                if admitted.ticket != NO_TICKET:
                    self._table.release(admitted.ticket)

    def _stepped(self, admitted: _Admitted) -> bool:
        """Note a step; False once the request was cancelled, through `control` or (called directly) through gRPC."""
        self._metrics.stepped()
        wanted = admitted.ticket == NO_TICKET or self._table.advance(admitted.ticket)
        return wanted and not admitted.request.is_cancelled()

    def _answer(self, admitted: _Admitted, drawing: Drawing | None) -> Any:
        if drawing is None:
            status = self._table.progress(admitted.ticket)
            return self._refuse(Cancelled(admitted.request.request_id(), status.step, status.steps))
        timings = {"queue": 1000 * admitted.waited, **drawing.timings}
        images, height, width, _ = drawing.images.shape
        if admitted.ticket != NO_TICKET:
            self._metrics.drawn(images, images * height * width, timings)
        return tensors.response(
            contract.GENERATE,
            {"pixels_out": drawing.images[None], "stage_timings": [[json.dumps(timings).encode()]]},
        )

    def _refuse(self, error: Exception) -> Any:
        if isinstance(error, Cancelled):
            self._metrics.cancelled()
        return triton_errors.response(error)
