"""The `generate` model: job tensors → files. The only model that owns a GPU; one process each, one batch at a time.

Files are written by the GPU or on threads, and answers sent on threads, while the GPU is at the next batch. They were a
model of their own once: three megabytes of pixels then went through two more processes, longer than to write them.
"""

import base64
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from fluxserve import contract, source
from fluxserve.errors import Cancelled, FluxserveError, NotFinite, SettingsError
from fluxserve.families import registry
from fluxserve.job import Job
from fluxserve.media.provenance import System
from fluxserve.pipeline import Drawing, Pipeline, View
from fluxserve.serving import envelope, shared_memory, tensors
from fluxserve.serving import errors as triton_errors
from fluxserve.serving.envelope import Delivery
from fluxserve.serving.files import Files, Finish, open_signer
from fluxserve.serving.lifecycle import ServedModel
from fluxserve.serving.metrics import DrawingMetrics
from fluxserve.serving.previews import Previewer
from fluxserve.serving.processes import Pace
from fluxserve.settings import Settings

_WRITERS = 2
"""Requests whose files are written at a time."""


@dataclass(frozen=True)
class _Asked:
    """A request of the batch, and where its answer goes."""

    request: Any
    job: Job
    delivery: Delivery

    @property
    def sender(self) -> Any:
        return self.request.get_response_sender()

    @property
    def steps(self) -> int:
        """Of all its images."""
        return self.job.steps * len(self.job.seeds)


class GenerateModel(ServedModel):
    """What Triton calls."""

    name = "generate"

    def load(self, config: Settings, args: dict[str, str]) -> None:
        offered = f"cuda:{args['model_instance_device_id']}" if args["model_instance_kind"] == "GPU" else "cpu"
        self._table.set_queue_timeout(_queue_timeout(json.loads(args["model_config"]), config.queue_timeout))
        torch.set_num_threads(config.threads or len(os.sched_getaffinity(0)))
        found = source.find(config)
        signer = open_signer(config, found.spec.name)  # before minutes of loading weights
        name = found.device(offered)
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # kernels are launched, and events recorded, on the current one
        components = found.open_components(name, config.dtype)
        self._spec, self._max_rows = found.spec, config.max_rows
        self._pipeline = Pipeline(found.spec, components, name, config.max_rows)
        begin = time.monotonic()
        self._heartbeat.draws_in(self._pipeline.warm_up())
        self._pace = Pace(self._heartbeat, time.monotonic() - begin)
        system = System(found.spec.name, found.engine, found.precision(name, config.dtype))
        self._files = Files(device if found.compiles else None, found.spec, system, signer)
        self._metrics = DrawingMetrics()
        self._previewer = Previewer(config.inflight_path, self._files)
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="answer")

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer a batch, each request as soon as it is drawn and not when the last of them is.

        Triton batches by shape; what differs in schedule all the same goes through the loop separately.
        """
        self._pace.begin()
        try:
            self._answer_all(requests)
        finally:
            self._pace.end()

    def _answer_all(self, requests: Sequence[Any]) -> None:
        groups: dict[tuple[object, ...], list[_Asked]] = defaultdict(list)
        for request in requests:
            try:
                asked = self._read(request)
                groups[asked.job.likeness].append(asked)
            except Exception as error:  # noqa: BLE001 (the border: one request's error must not take its neighbours along)
                tensors.send(request.get_response_sender(), self._refusal(error))
        for group in groups.values():
            for part in self._parts(group):
                self._draw(part)

    def unload(self) -> None:
        self._writers.shutdown()
        self._previewer.close()
        self._pipeline.close()

    def _read(self, request: Any) -> _Asked:
        job, delivery = envelope.opened(tensors.read(request, contract.GENERATE))
        registry.of(self._spec).check(job, self._spec)
        return _Asked(request, job, delivery)

    def _parts(self, group: Sequence[_Asked]) -> Iterator[list[_Asked]]:
        """Requests that go through the loop together: as many as have max_rows images between them, or one."""
        part: list[_Asked] = []
        for asked in group:
            rows = sum(len(a.job.seeds) for a in (*part, asked))
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
                waited.append(self._table.start(asked.delivery.ticket, asked.steps))
                started.append(asked)
            except FluxserveError as error:  # cancelled, or not admitted by `prepare`
                tensors.send(asked.sender, self._refusal(error))
        if not started:
            return
        self._pace.draw()
        try:
            drawings = self._pipeline.draw(
                [a.job for a in started],
                lambda index: self._stepped(started[index]),
                lambda index, view: self._look(started[index], view),
            )
        except Exception as error:  # noqa: BLE001 (the border: Triton would answer a raise with a bare traceback)
            drawings = []
            for asked in started:
                tensors.send(asked.sender, self._refusal(error))
        finally:
            done = self._given_back(started)
        if not drawings:
            self._metrics.stepped(sum(done))
            return
        for asked, seconds, drawing, steps in zip(started, waited, drawings, done, strict=True):
            if drawing is None:
                self._metrics.stepped(steps)
                tensors.send(asked.sender, self._refusal(Cancelled(asked.request.request_id(), steps, asked.steps)))
            else:
                self._hand_over(asked, drawing, {"queue": 1000 * seconds, **drawing.timings})
        self._metrics.saturated(self._pipeline.saturated())

    def _given_back(self, started: Sequence[_Asked]) -> list[int]:
        """Release the slots of requests that are over; return how many steps each has done."""
        done = [self._table.progress(asked.delivery.ticket).step for asked in started]
        for asked in started:
            self._table.release(asked.delivery.ticket)
            self._previewer.end(asked.delivery.ticket)
        return done

    def _look(self, asked: _Asked, view: View) -> None:
        self._previewer.look(asked.job, asked.delivery, view)

    def _stepped(self, asked: _Asked) -> bool:
        """Note a step; False once the request was cancelled, through `control` or (called directly) through gRPC."""
        wanted = self._table.advance(asked.delivery.ticket)
        self._pace.step(last=self._table.progress(asked.delivery.ticket).step % asked.job.steps == 0)
        return wanted and not asked.request.is_cancelled()

    def _hand_over(self, asked: _Asked, drawing: Drawing, timings: dict[str, float]) -> None:
        """Do with the files what the GPU has to, and leave the rest to a thread."""
        begin = time.perf_counter()
        try:
            wanted = asked.delivery
            finish = self._files.begin(drawing, asked.job, wanted.output_format, wanted.quality, wanted.prompt)
        except Exception as error:  # noqa: BLE001 (the border: one request's error must not take its neighbours along)
            tensors.send(asked.sender, self._refusal(error))
            return
        timings["image"] = 1000 * (time.perf_counter() - begin)
        size = tuple(drawing.pixels.shape[1:3])
        self._pace.begin()
        self._writers.submit(self._finish, asked, finish, size, timings).add_done_callback(triton_errors.report)

    def _finish(self, asked: _Asked, finish: Finish, size: tuple[int, ...], timings: dict[str, float]) -> None:
        """Answer with the files, on a thread; then count.

        Each number that is counted is a message to Triton's process, and waits for its reply.
        """
        try:
            written = self._answer(asked, finish, size, timings)
        finally:
            self._pace.end()
        if not written:
            self._metrics.stepped(asked.steps)
        else:
            images = len(asked.job.seeds)
            self._metrics.drawn(images, images * math.prod(size), asked.steps, timings)

    def _answer(self, asked: _Asked, finish: Finish, size: tuple[int, ...], timings: dict[str, float]) -> bool:
        """Send the files, or why there are none; return whether they could be written."""
        begin = time.perf_counter()
        try:
            files = finish()
            if asked.delivery.encoding == "base64":
                files = [base64.b64encode(file) for file in files]
        except Exception as error:  # noqa: BLE001 (the border: nobody would hear of it on a thread)
            tensors.send(asked.sender, self._refusal(error))
            return False
        timings["image"] += 1000 * (time.perf_counter() - begin)
        with shared_memory.answering:
            try:
                answer = _answer(asked, files, size, timings)
            except Exception as error:  # noqa: BLE001 (likewise)
                answer = self._refusal(error)
            tensors.send(asked.sender, answer)
        return True

    def _refusal(self, error: Exception) -> Any:
        if isinstance(error, Cancelled):
            self._metrics.cancelled()
        elif isinstance(error, NotFinite):
            self._metrics.not_finite()
        return triton_errors.response(error)


def _queue_timeout(config: Mapping[str, Any], chosen: int) -> float:
    """Return how many seconds Triton lets a request wait for this model.

    Args:
        config: the model's configuration, as Triton hands it on.
        chosen: the setting; 0: none.

    Raises:
        SettingsError: Triton's bound is missing, or is not the setting's.
    """
    policy = config.get("dynamic_batching", {}).get("default_queue_policy", {})
    seconds = int(policy.get("default_timeout_microseconds", 0)) / 1e6
    if seconds <= 0:
        allowed = "a number above 0, in the default_queue_policy of generate/config.pbtxt"
        raise SettingsError("default_timeout_microseconds", 0, allowed)
    if chosen not in (0, seconds):
        allowed = f"{seconds:g}, as generate/config.pbtxt says; `fluxserve serve` writes the setting into it"
        raise SettingsError("queue_timeout", chosen, allowed)
    return seconds


def _answer(asked: _Asked, files: list[bytes], size: tuple[int, ...], timings: Mapping[str, float]) -> Any:
    """Files and what belongs to them; each output with the batch dimension of 1."""
    return tensors.response(
        contract.GENERATE,
        {
            "images": [files],
            "seeds": [asked.job.seeds],
            "timings": [[json.dumps({stage: round(spent, 3) for stage, spent in timings.items()}).encode()]],
            "image_size": [size],
        },
    )
