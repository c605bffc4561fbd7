"""What Prometheus reads. Labels are names this server knows, and never more of them than the limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_INTER_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
OTHERS = "(others)"  # no adapter can have this name: it counts those beyond the limit


class Metrics:
    def __init__(self, engine: Any, models: int):
        """models: labels there may be at most; adapters beyond share one."""
        disable_created_metrics()  # a second series for each one, which says when it began
        self.registry = CollectorRegistry()
        self._models, self._most = set(), models

        def make(kind, name, text, labels=("model",), **options):
            return kind(f"fastft_{name}", text, labels, registry=self.registry, **options)

        self._requests = make(Counter, "requests", "Sequences that ended, by how.", ("model", "finish_reason"))
        self._prompt = make(Counter, "prompt_tokens", "Tokens of prompts that were taken in.")
        self._tokens = make(Counter, "generated_tokens", "Tokens produced.")
        self._first = make(
            Histogram, "time_to_first_token_seconds", "From taking a request in to its first token.", buckets=_FIRST_TOKEN
        )
        self._inter = make(Histogram, "inter_token_seconds", "Between two tokens of one sequence.", buckets=_INTER_TOKEN)
        self._whole = make(Histogram, "request_seconds", "From taking a sequence in to its end.", buckets=_WHOLE)
        self._errors = make(Counter, "errors", "Requests answered with an error, by its code.", ("code",))
        self.registry.register(_EngineStats(engine))

    def of(self, model: str) -> ModelMetrics:
        """The series of a model that exists: call it for names that the engine has accepted."""
        if model not in self._models:
            if len(self._models) >= self._most:
                model = OTHERS
            else:
                self._models.add(model)
        return ModelMetrics(self, model)

    def count_error(self, code: str) -> None:
        self._errors.labels(code).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class ModelMetrics:
    def __init__(self, metrics: Metrics, label: str):
        self._metrics, self._label = metrics, label
        self.prompt_tokens = metrics._prompt.labels(label)
        self.tokens = metrics._tokens.labels(label)
        self.first_token = metrics._first.labels(label)
        self.inter_token = metrics._inter.labels(label)
        self.seconds = metrics._whole.labels(label)

    def ended(self, finish_reason: str) -> None:
        self._metrics._requests.labels(self._label, finish_reason).inc()


class _EngineStats:
    """The engine's and the adapter memory's own numbers, read when Prometheus asks."""

    def __init__(self, engine: Any):
        self._engine = engine

    def describe(self) -> Iterable[Any]:
        return ()

    def collect(self) -> Iterable[Any]:
        yield from _families("fastft_engine", "Of the engine", self._engine.stats())
        if self._engine.adapters is not None:
            yield from _families("fastft_adapter_memory", "Of the adapter memory", self._engine.adapters.stats())


def _families(prefix: str, what: str, stats: dict[str, Any]) -> Iterable[Any]:
    for key, value in stats.items():
        if isinstance(value, dict):
            yield from _families(f"{prefix}_{key}", what, value)
        elif isinstance(value, int | float):
            family = CounterMetricFamily if key.endswith("_total") else GaugeMetricFamily
            yield family(f"{prefix}_{key.removesuffix('_total')}", f"{what}: {key.replace('_', ' ')}.", value=float(value))
