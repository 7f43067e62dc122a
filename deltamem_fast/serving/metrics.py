"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        common = {"namespace": "deltamem", "registry": self.registry}
        self.requests = Counter("requests", "Requests by route and status.", ("route", "status"), **common)
        self.seconds = Histogram("request_seconds", "Seconds of a request.", ("route",), buckets=_SECONDS, **common)
        self.first = Histogram("first_token_seconds", "Seconds to an answer's first text.", buckets=_SECONDS, **common)
        self.tokens = Counter("tokens", "Tokens of prompts and answers.", ("part",), **common)
        self.rows = Histogram("batch_rows", "Requests in one generate.", buckets=(1, 2, 4, 8, 16, 32, 64), **common)
        self.conflicts = Counter("memory_conflicts", "Memories that had moved on when written.", **common)
        self.waiting = Gauge("waiting_requests", "Requests that wait for their turn.", **common)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
