"""Count for Prometheus. Labels hold the names of served models alone: callers cannot make new time series."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fluxserve_gateway.fleet import Fleet, Server

_SECONDS = (0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 13, 20, 30, 60, 120, 300)


class Metrics:
    """Holds the metrics of one gateway, in a registry of its own."""

    def __init__(self, fleet: Fleet) -> None:
        self.registry = CollectorRegistry()
        named = ("model", "operation")
        prefix = "fluxserve_gateway_"
        self.requests = Counter(
            f"{prefix}requests", "Requests for pictures that have ended", (*named, "outcome"), registry=self.registry
        )
        self.seconds = Histogram(
            f"{prefix}request_seconds",
            "From a request's first byte to its answer's last",
            named,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            f"{prefix}queue_seconds",
            "What the picture waited on its server",
            ("model",),
            buckets=(0.001, 0.01, *_SECONDS),
            registry=self.registry,
        )
        self.pixels = Counter(f"{prefix}pixels", "Pixels of pictures drawn", ("model",), registry=self.registry)
        self.ready = Gauge(
            f"{prefix}server_ready", "1 if the server takes requests", ("server",), registry=self.registry
        )
        self.in_flight = Gauge(
            f"{prefix}server_in_flight", "Requests on the server now", ("server",), registry=self.registry
        )
        for server in fleet.servers:
            self.ready.labels(server.url).set_function(partial(_ready, server))
            self.in_flight.labels(server.url).set_function(partial(_in_flight, server))

    def ended(self, model: str, operation: str, outcome: str, seconds: float) -> None:
        """Count a request for pictures."""
        self.requests.labels(model, operation, outcome).inc()
        self.seconds.labels(model, operation).observe(seconds)

    def drawn(self, model: str, pixels: int, queue_s: float) -> None:
        """Count the pixels that a request drew, and its wait."""
        self.pixels.labels(model).inc(pixels)
        self.queue_seconds.labels(model).observe(queue_s)

    def text(self) -> bytes:
        """Write all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


def _ready(server: Server) -> float:
    return float(server.ready)


def _in_flight(server: Server) -> float:
    return float(server.in_flight)
