"""Metrics for Prometheus: what the scheduler reports, and what it holds at the moment of a scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cushion_deploy.serve.engine import Engine
from cushion_deploy.serve.observer import Observer
from cushion_deploy.serve.request import EndReason, SequenceUsage

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
_ROWS = (1, 2, 4, 8, 16, 32, 64)


class Metrics(Observer):
    """Counts and times in a registry of its own."""

    def __init__(self) -> None:
        """Register the metrics."""
        self.registry = registry = CollectorRegistry()
        self._prompt = Counter("cushion_prompt_tokens", "Prompt tokens of admitted sequences.", registry=registry)
        self._cached = Counter(
            "cushion_cached_prompt_tokens", "Prompt tokens that were not computed again.", registry=registry
        )
        self._prefilled = Counter("cushion_prefill_tokens", "Prompt tokens computed.", registry=registry)
        self._generated = Counter("cushion_generated_tokens", "Tokens generated.", registry=registry)
        self._finished = Counter("cushion_sequences_finished", "Sequences by end.", ["end"], registry=registry)
        self._queue = Histogram(
            "cushion_queue_seconds", "Time until a row is free.", buckets=_SECONDS, registry=registry
        )
        self._first = Histogram(
            "cushion_time_to_first_token_seconds", "From submission.", buckets=_SECONDS, registry=registry
        )
        self._between = Histogram(
            "cushion_time_per_output_token_seconds", "Between tokens.", buckets=_TOKEN_SECONDS, registry=registry
        )
        self._total = Histogram(
            "cushion_sequence_seconds", "From submission to the end.", buckets=_SECONDS, registry=registry
        )
        self._rows = Histogram("cushion_decode_rows", "Rows of each decode step.", buckets=_ROWS, registry=registry)

    def watch(self, engine: Engine) -> None:
        """Add what the engine holds at the moment of a scrape."""
        self.registry.register(_Held(engine))

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def admitted(self, seconds: float, usage: SequenceUsage) -> None:
        """Count the prompt and the part of it that was kept."""
        self._queue.observe(seconds)
        self._prompt.inc(usage.prompt_tokens)
        self._cached.inc(usage.cached_tokens)

    def prefilled(self, tokens: int) -> None:
        """Count computed prompt tokens."""
        self._prefilled.inc(tokens)

    def decoded(self, rows: int) -> None:
        """Count the rows of a step."""
        self._rows.observe(rows)

    def token(self, seconds: float, *, first: bool) -> None:
        """Time a token."""
        self._generated.inc()
        (self._first if first else self._between).observe(seconds)

    def finished(self, end: EndReason, seconds: float) -> None:
        """Count and time a sequence."""
        self._finished.labels(end).inc()
        self._total.observe(seconds)


class _Held(Collector):
    """Gauges that are read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        scheduler, pool = self._engine.scheduler, self._engine.pool
        for name, text, value in (
            ("cushion_sequences_waiting", "Sequences that wait for a row.", scheduler.waiting),
            ("cushion_sequences_running", "Sequences that have a row.", scheduler.running),
            ("cushion_kv_pool_bytes", "Keys and values kept for reuse.", pool.nbytes),
            ("cushion_kv_pool_texts", "Texts kept for reuse.", len(pool)),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily("cushion_kv_pool_evictions", "Texts evicted.", value=pool.evictions)
