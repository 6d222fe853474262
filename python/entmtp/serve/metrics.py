"""What the server counts, as Prometheus reads it: docs/serve.md lists the names.

Requests are counted as they end, steps of the decoder when a generation ends: a few additions per request, none per
token. The text is made when somebody asks for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import HistogramMetricFamily, Metric

from ..native.stats import DraftStats
from .requests import CLIENT_LEFT, ServedRequest

disable_created_metrics()  # a second series for every counter, which nobody reads

# nats; H of a sure model is near 0, of a lost one about ln of its vocabulary
ENTROPY_EDGES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

PATHS = (
    "/v1/responses",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/engines/copilot-codex/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/api/chat",
    "/api/generate",
    "/api/show",
    "/api/embed",
    "/tokenize",
    "/tokenize/count",
    "/detokenize",
    "/extras/tokenize",
    "/extras/tokenize/count",
    "/extras/detokenize",
)


class EntropyHistogram:
    """The running estimate of the entropy at every step; a whole generation is added at once."""

    def __init__(self) -> None:
        self._counts: dict[str, np.ndarray] = {}  # by model: steps per bucket, the last one without an edge
        self._sums: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, model: str, entropy: np.ndarray) -> None:
        bins = np.searchsorted(ENTROPY_EDGES, entropy)  # a bucket holds its upper edge
        counts = np.bincount(bins, minlength=len(ENTROPY_EDGES) + 1)
        with self._lock:
            self._counts[model] = self._counts.get(model, 0) + counts
            self._sums[model] = self._sums.get(model, 0.0) + float(entropy.sum(dtype=np.float64))

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(
            "entmtp_entropy_nats",
            "Running entropy of the model's predictions at each step.",
            labels=["model"],
        )
        edges = [*(f"{edge:g}" for edge in ENTROPY_EDGES), "+Inf"]
        with self._lock:
            for model, counts in self._counts.items():
                buckets = [(edge, float(n)) for edge, n in zip(edges, np.cumsum(counts), strict=True)]
                family.add_metric([model], buckets, self._sums[model])
        yield family


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"entmtp_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(
                f"entmtp_{name}_seconds", text, ["path"], buckets=SECONDS, registry=self.registry
            )

        self.requests = counter("requests", "Requests by status; 499: the client left.", "path", "status")
        self.latency = seconds("request", "From the request to the end of its answer.")
        self.queued = seconds("queue", "Waiting for the model.")
        self.first_token = seconds(
            "time_to_first_token", "From the request to the first token, waiting included."
        )

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, cached ones among them.", "model")
        self.generated_tokens = counter("generated_tokens", "Tokens drawn.", "model")
        self.steps = counter("steps", "Passes of the base model that checked a tree or one token.", "model")
        self.drafted = counter("drafted_tokens", "Guesses that were verified.", "model")
        self.accepted = counter("accepted_tokens", "Guesses that were taken.", "model")
        self.trees = counter("tree_steps", "Steps by the tree that was chosen.", "model", "tree")
        self.step_seconds = counter("step_seconds", "Time of the steps by kind of work.", "model", "part")
        self.lossless = Gauge(
            "entmtp_lossless", "1: the text of plain decoding bit for bit; 0: up to rounding, or lossy.", ["model"],
            registry=self.registry,
        )  # fmt: skip
        self.entropy = EntropyHistogram()
        self.registry.register(self.entropy)

    def watch_queue(self, waiting: Callable[[], int], running: Callable[[], int]) -> None:
        """Ask these for the length of the queue, when somebody reads it."""
        for name, text, count in (
            ("requests_waiting", "Requests that wait for the model.", waiting),
            ("requests_running", "Requests that have the model, or are being sent their answer.", running),
        ):
            Gauge(f"entmtp_{name}", text, registry=self.registry).set_function(count)

    def request(self, request: ServedRequest, now: float) -> None:
        """Count a finished request."""
        path = request.path if request.path in PATHS else "other"  # a client must not make up new series
        status = 499 if request.stopped == CLIENT_LEFT else request.status or 500
        self.requests.labels(path, status).inc()
        self.latency.labels(path).observe(now - request.arrived)
        if request.started is not None:
            self.queued.labels(path).observe(request.started - request.arrived)
        if request.first_token is not None:
            self.first_token.labels(path).observe(request.first_token - request.arrived)

    def generation(self, model: str, n_prompt: int, n_tokens: int, stats: DraftStats) -> None:
        """Count one generation, finished or stopped."""
        self.prompt_tokens.labels(model).inc(n_prompt)
        self.generated_tokens.labels(model).inc(n_tokens)
        self.steps.labels(model).inc(stats.n_steps)
        self.drafted.labels(model).inc(stats.n_drafted)
        self.accepted.labels(model).inc(stats.n_accepted)
        for tree, n in stats.trees_used.items():
            self.trees.labels(model, tree).inc(n)
        for part, spent in stats.time_split.items():
            self.step_seconds.labels(model, part).inc(spent)
        self.lossless.labels(model).set(stats.lossless == "exact")
        self.entropy.add(model, stats.steps["entropy"])

    def text(self, accept: str | None) -> tuple[bytes, str]:
        """Everything, in the format that an Accept header asks for; and its content type."""
        encode, content_type = choose_encoder(accept or "")
        return encode(self.registry), content_type
