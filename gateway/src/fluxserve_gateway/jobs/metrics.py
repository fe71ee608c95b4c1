"""What Prometheus reads about jobs. Waiting and running are counted over all gateways that share the database."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from fluxserve_gateway.jobs.store import QUEUED, RUNNING


class JobMetrics:
    """Registered beside the gateway's own metrics."""

    def __init__(self, registry: CollectorRegistry, models: Iterable[str]) -> None:
        self._models = tuple(models)
        prefix = "fluxserve_gateway_"
        self._gauges = {
            QUEUED: Gauge(f"{prefix}jobs_queued", "Jobs that wait, of all gateways", ("model",), registry=registry),
            RUNNING: Gauge(
                f"{prefix}jobs_running", "Jobs that are drawn, of all gateways", ("model",), registry=registry
            ),
        }
        self._ended = Counter(
            f"{prefix}jobs_ended", "Jobs that this gateway ended", ("model", "status"), registry=registry
        )
        self._deliveries = Counter(
            f"{prefix}webhook_tries", "Tries to deliver a webhook", ("outcome",), registry=registry
        )
        self.counted({})

    def counted(self, counts: Mapping[tuple[str, str], int]) -> None:
        """Set how many jobs wait and are drawn, by model and status. Other gateways' models are left out."""
        for status, gauge in self._gauges.items():
            for model in self._models:
                gauge.labels(model).set(counts.get((model, status), 0))

    def ended(self, model: str, status: str) -> None:
        """Count a job that has ended; one of a model that is served elsewhere counts there."""
        if model in self._models:
            self._ended.labels(model, status).inc()

    def tried(self, outcome: str) -> None:
        """Count a try to deliver a webhook."""
        self._deliveries.labels(outcome).inc()
