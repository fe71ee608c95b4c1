"""Custom metrics, beside Triton's own on the metrics port. A family must stay referenced for as long as it counts."""

from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

_STAGE_BUCKETS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0]


def _counter(name: str, description: str) -> Any:
    return pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)


def _gauge(name: str, description: str) -> Any:
    return pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.GAUGE)


class QueueMetrics:
    """`control`: requests in flight, as the table has them."""

    def __init__(self) -> None:
        self._families = (
            _gauge("fluxserve_waiting_requests", "Requests that were admitted and wait for the GPU"),
            _gauge("fluxserve_running_requests", "Requests that are drawn"),
        )
        self._waiting, self._running = (family.Metric(labels={}) for family in self._families)

    def see(self, waiting: int, running: int) -> None:
        self._waiting.set(waiting)
        self._running.set(running)


class RefusalMetrics:
    """`prepare`: requests that never reached the GPU, by reason."""

    REASONS = (
        "invalid_request",
        "queue_full",
        "images_full",
        "no_room",
        "draining",
        "request_id_in_use",
        "cancelled",
        "internal",
    )

    def __init__(self) -> None:
        self._family = _counter("fluxserve_rejected_requests_total", "Requests refused before they reached the GPU")
        self._reasons = {r: self._family.Metric(labels={"reason": r}) for r in self.REASONS}

    def refused(self, reason: str) -> None:
        self._reasons[reason].increment(1)


class DrawingMetrics:
    """`generate`: what was drawn, and where the time went."""

    STAGES = ("queue", "encode", "denoise", "decode", "total", "image")

    def __init__(self) -> None:
        families = {
            "images": _counter("fluxserve_images_total", "Images drawn"),
            "pixels": _counter("fluxserve_pixels_total", "Pixels drawn"),
            "steps": _counter("fluxserve_steps_total", "Denoising steps run, one for each image and step"),
            "cancellations": _counter("fluxserve_cancellations_total", "Requests cancelled while waiting or running"),
            "not_finite": _counter(
                "fluxserve_not_finite_requests_total",
                "Requests whose picture was NaN or infinity, and was not sent: expected 0",
            ),
            "saturated": _counter(
                "fluxserve_saturated_values_total",
                "FP8 values that were too large for their static scale, in a sample of the rows: expected 0",
            ),
        }
        self._counters = {name: family.Metric(labels={}) for name, family in families.items()}
        stage = pb_utils.MetricFamily(
            name="fluxserve_stage_seconds",
            description="Seconds by stage: queue and image on the host's clock, the others on the device's",
            kind=pb_utils.MetricFamily.HISTOGRAM,
        )
        self._stages = {s: stage.Metric(labels={"stage": s}, buckets=_STAGE_BUCKETS) for s in self.STAGES}
        self._families = (*families.values(), stage)
        self._saturated = 0

    def stepped(self, steps: int) -> None:
        """Count the steps of a request that is over, or of several: one message to Triton, which waits for a reply."""
        if steps:
            self._counters["steps"].increment(steps)

    def cancelled(self) -> None:
        self._counters["cancellations"].increment(1)

    def not_finite(self) -> None:
        self._counters["not_finite"].increment(1)

    def saturated(self, total: int) -> None:
        """Count what has been added since the last total."""
        if total > self._saturated:
            self._counters["saturated"].increment(total - self._saturated)
            self._saturated = total

    def drawn(self, images: int, pixels: int, steps: int, milliseconds: Mapping[str, float]) -> None:
        self.stepped(steps)
        self._counters["images"].increment(images)
        self._counters["pixels"].increment(pixels)
        for stage, spent in milliseconds.items():
            self._stages[stage].observe(spent / 1000)
