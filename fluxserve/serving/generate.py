"""The `generate` model: job tensors → files. The only model that owns a GPU; one process each, one batch at a time.

Files are written by the GPU or on threads, and answers sent on threads, while the GPU is at the next batch. They were a
model of their own once: three megabytes of pixels then went through two more processes, longer than to write them.
"""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton_python_backend_utils as pb_utils

from fluxserve import contract, source
from fluxserve.errors import Cancelled, InvalidRequest, NotFinite
from fluxserve.job import Job, split
from fluxserve.pipeline import Drawing, Pipeline
from fluxserve.serving import errors as triton_errors
from fluxserve.serving import tensors
from fluxserve.serving.files import Files, Finish
from fluxserve.serving.inflight import NO_TICKET
from fluxserve.serving.lifecycle import ServedModel
from fluxserve.serving.metrics import DrawingMetrics
from fluxserve.settings import Settings

_WRITERS = 2
"""Requests whose files are written at a time."""


@dataclass(frozen=True)
class _Asked:
    """A request of the batch, and where its answer goes."""

    request: Any
    job: Job
    ticket: int
    output_format: str
    quality: int

    @property
    def steps(self) -> int:
        """Of all its images."""
        return self.job.steps * len(self.job.noise_seeds)


class GenerateModel(ServedModel):
    """What Triton calls."""

    name = "generate"

    def load(self, config: Settings, args: dict[str, str]) -> None:
        offered = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        found = source.find(config)
        name = found.device(offered)
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched, and events recorded, on the current one
        components = found.open_components(name, config.dtype)
        self._spec, self._max_rows = found.spec, config.max_rows
        self._pipeline = Pipeline(found.spec, components, name, config.max_rows)
        self._pipeline.warm_up()
        self._files = Files(device if found.compiles else None, found.spec.defaults.side)
        self._metrics = DrawingMetrics()
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="answer")

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer a batch, each request as soon as it is drawn and not when the last of them is.

        Triton batches by shape; what differs in schedule all the same goes through the loop separately.
        """
        groups: dict[tuple[object, ...], list[_Asked]] = defaultdict(list)
        for request in requests:
            try:
                asked = self._read(request)
                groups[asked.job.likeness].append(asked)
            except Exception as error:  # noqa: BLE001 (the border: one request's error must not take its neighbours along)
                _send(request, self._refusal(error))
        for group in groups.values():
            for part in self._parts(group):
                self._draw(part)

    def unload(self) -> None:
        self._writers.shutdown()
        self._pipeline.close()

    def _read(self, request: Any) -> _Asked:
        arrays = tensors.read(request, contract.GENERATE)
        for name, array in arrays.items():
            if len(array) != 1:
                raise InvalidRequest(
                    name, f"a batch of {len(array)}", "one request at a time; Triton forms the batches"
                )
        job = Job(
            token_ids=arrays["token_ids"][0],
            token_ids_2=arrays["token_ids_2"][0],
            pixels=arrays["pixels"][0],
            sigmas=arrays["sigmas"][0],
            guidance=float(arrays["guidance"][0, 0]),
            noise_seeds=tuple(int(seed) for seed in arrays["noise_seeds"][0]),
            token_mask=arrays["token_mask"][0],
            references=split(arrays["references"][0], arrays["reference_sizes"][0]),
        )
        job.check(self._spec)
        return _Asked(request, job, int(arrays["ticket"][0, 0]), *_format(arrays))

    def _parts(self, group: Sequence[_Asked]) -> Iterator[list[_Asked]]:
        """Requests that go through the loop together: as many as have max_rows images between them, or one."""
        part: list[_Asked] = []
        for asked in group:
            rows = sum(len(a.job.noise_seeds) for a in (*part, asked))
            if part and rows > self._max_rows:
                yield part
                part = []
            part.append(asked)
        yield part

    def _draw(self, part: Sequence[_Asked]) -> None:
        """Draw requests of one likeness and answer them; their slots are given back whatever happens."""
        started: list[_Asked] = []
        waited: list[float] = []
        for asked in part:
            try:
                waited.append(self._start(asked))
                started.append(asked)
            except Cancelled as error:
                _send(asked.request, self._refusal(error))
        if not started:
            return
        try:
            drawings = self._pipeline.draw([a.job for a in started], lambda index: self._stepped(started[index]))
            done = [
                self._done(asked) if drawing is None else 0 for asked, drawing in zip(started, drawings, strict=True)
            ]
        except Exception as error:  # noqa: BLE001 (the border: Triton would answer a raise with a bare traceback)
            for asked in started:
                _send(asked.request, self._refusal(error))
            return
        finally:
            for asked in started:
                if asked.ticket != NO_TICKET:
                    self._table.release(asked.ticket)
        for asked, seconds, drawing, steps in zip(started, waited, drawings, done, strict=True):
            if drawing is None:
                _send(asked.request, self._refusal(Cancelled(asked.request.request_id(), steps, asked.steps)))
            else:
                self._hand_over(asked, drawing, {"queue": 1000 * seconds, **drawing.timings})
        self._metrics.saturated(self._pipeline.saturated())

    def _start(self, asked: _Asked) -> float:
        """Seconds that a request waited. Raises Cancelled if nobody wants it any more."""
        return 0.0 if asked.ticket == NO_TICKET else self._table.start(asked.ticket, asked.steps)

    def _stepped(self, asked: _Asked) -> bool:
        """Note a step; False once the request was cancelled, through `control` or (called directly) through gRPC."""
        if asked.ticket == NO_TICKET:
            return not asked.request.is_cancelled()
        self._metrics.stepped()
        return self._table.advance(asked.ticket) and not asked.request.is_cancelled()

    def _done(self, asked: _Asked) -> int:
        """Steps, before its slot is given back."""
        return 0 if asked.ticket == NO_TICKET else self._table.progress(asked.ticket).step

    def _hand_over(self, asked: _Asked, drawing: Drawing, timings: dict[str, float]) -> None:
        """Do with the files what the GPU has to, and leave the rest to a thread."""
        begin = time.perf_counter()
        try:
            finish = self._files.begin(drawing, asked.output_format, asked.quality)
        except Exception as error:  # noqa: BLE001 (the border: one request's error must not take its neighbours along)
            _send(asked.request, self._refusal(error))
            return
        timings["image"] = 1000 * (time.perf_counter() - begin)
        size = tuple(drawing.pixels.shape[1:3])
        self._writers.submit(self._finish, asked, finish, size, timings).add_done_callback(_report)

    def _finish(self, asked: _Asked, finish: Finish, size: tuple[int, ...], timings: dict[str, float]) -> None:
        """Answer with the files, on a thread; then count.

        Each number that is counted is a message to Triton's process, and waits for its reply.
        """
        begin = time.perf_counter()
        try:
            files = finish()
            timings["image"] += 1000 * (time.perf_counter() - begin)
            answer = _answer(asked, files, size, timings)
        except Exception as error:  # noqa: BLE001 (the border: nobody would hear of it on a thread)
            answer = self._refusal(error)
        _send(asked.request, answer)
        if asked.ticket != NO_TICKET:  # Triton's warm-up is no picture
            images = len(asked.job.noise_seeds)
            self._metrics.drawn(images, images * math.prod(size), timings)

    def _refusal(self, error: Exception) -> Any:
        if isinstance(error, Cancelled):
            self._metrics.cancelled()
        elif isinstance(error, NotFinite):
            self._metrics.not_finite()
        return triton_errors.response(error)


def _format(arrays: Mapping[str, Any]) -> tuple[str, int]:
    """Output format and quality, looked at before anything is drawn. Raises InvalidRequest."""
    name, quality = arrays["resolved_format"][0, 0].decode(errors="replace"), int(arrays["resolved_quality"][0, 0])
    if name not in contract.OUTPUT_FORMATS:
        raise InvalidRequest("resolved_format", repr(name[:40]), ", ".join(contract.OUTPUT_FORMATS))
    if not 1 <= quality <= 100:
        raise InvalidRequest("resolved_quality", str(quality), "1 to 100")
    return name, quality


def _report(finished: "Future[None]") -> None:
    """Nobody asks a thread how it went: an answer that could not even be sent is in the log."""
    if error := finished.exception():
        triton_errors.log(error)


def _answer(asked: _Asked, files: list[bytes], size: tuple[int, ...], timings: Mapping[str, float]) -> Any:
    """Files and what belongs to them; each output with the batch dimension of 1."""
    return tensors.response(
        contract.GENERATE,
        {
            "images": [files],
            "seeds": [asked.job.noise_seeds],
            "timings": [[json.dumps({stage: round(spent, 3) for stage, spent in timings.items()}).encode()]],
            "image_size": [size],
        },
    )


def _send(request: Any, response: Any) -> None:
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    request.get_response_sender().send(response, flags=final)
