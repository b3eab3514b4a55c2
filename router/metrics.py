"""Prometheus metrics of one router: ``baton:`` with the suffixes that vLLM's dashboards use.

``MeteredFrontend`` stands between the servers and the core and sees every request once,
whichever server it came by. Loads are read at scrape time. Labels are bounded: the model,
finish reasons, error codes, and at most MAX_WORKERS workers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from baton.protocol.clock import Clock, MonotonicClock
from baton.protocol.errors import BatonError, Cancelled
from baton.protocol.ids import RequestId
from router.closing import closing
from router.frontend import Frontend, GenerateSpec, Loads, ModelInfo, Output
from router.load_metrics import LoadCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# fmt: off
_SECONDS_TO_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0,
    2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)
_SECONDS_OF_GAPS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
    0.75, 1.0, 2.5, 5.0, 10.0, 20.0,
)
_SECONDS_END_TO_END = (
    0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0,
    40.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
)
# fmt: on
_TOKENS = tuple(float(2**power) for power in range(21))


class RouterMetrics:
    """Owns its registry, so that two routers in one process do not meet."""

    def __init__(self, frontend: Frontend) -> None:
        self._registry = CollectorRegistry()
        self._model = frontend.model.name
        self.ttft_s = self._histogram(
            "time_to_first_token_seconds", "Arrival to first token.", _SECONDS_TO_FIRST_TOKEN
        )
        self.gap_s = self._histogram(
            "inter_token_latency_seconds", "Gap between tokens of a choice.", _SECONDS_OF_GAPS
        )
        self.second_token_gap_s = self._histogram(
            "second_token_gap_seconds",
            "Gap from the first to the second token: it holds the KV hand-over.",
            _SECONDS_OF_GAPS,
        )
        self.e2e_s = self._histogram(
            "e2e_request_latency_seconds", "Arrival to the last token.", _SECONDS_END_TO_END
        )
        self.prompt_size = self._histogram(
            "request_prompt_tokens", "Prompt tokens of one request.", _TOKENS
        )
        self.output_size = self._histogram(
            "request_generation_tokens", "Output tokens of one choice.", _TOKENS
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens taken in.")
        self.output_tokens = self._counter("generation_tokens", "Tokens given out.")
        self._successes = Counter(
            "baton:request_success",
            "Choices that ended, by reason: stop, length or abort.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._errors = Counter(
            "baton:request_errors",
            "Requests that failed, by error code.",
            ["model_name", "code"],
            registry=self._registry,
        )
        self._registry.register(LoadCollector(frontend))

    def finished(self, reason: str) -> None:
        self._successes.labels(self._model, reason).inc()

    def failed(self, code: str) -> None:
        self._errors.labels(self._model, code).inc()

    def exposition(self) -> bytes:
        """In the Prometheus text format, ``CONTENT_TYPE``."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"baton:{name}", text, ["model_name"], buckets=buckets, registry=self._registry
        ).labels(self._model)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"baton:{name}", text, ["model_name"], registry=self._registry).labels(
            self._model
        )


class MeteredFrontend:
    """A ``Frontend`` that counts what passes. Give the same one to all servers."""

    def __init__(self, inner: Frontend, metrics: RouterMetrics, clock: Clock | None = None) -> None:
        self._inner = inner
        self._metrics = metrics
        self._clock = clock or MonotonicClock()

    @property
    def model(self) -> ModelInfo:
        return self._inner.model

    def abort(self, request_id: RequestId) -> bool:
        return self._inner.abort(request_id)

    def loads(self) -> Loads:
        return self._inner.loads()

    def ready(self) -> str | None:
        return self._inner.ready()

    async def generate(self, spec: GenerateSpec) -> AsyncGenerator[Output, None]:
        record = _RequestRecord(self._metrics, spec, self._clock.now())
        try:
            async with closing(self._inner.generate(spec)) as outputs:
                async for output in outputs:
                    record.take(output, self._clock.now())
                    yield output
        except Cancelled:
            record.abandoned()
            raise
        except BatonError as exc:
            self._metrics.failed(exc.code)
            raise
        except Exception:
            self._metrics.failed("internal")
            raise
        except BaseException:  # closed early or cancelled: the client went away
            record.abandoned()
            raise
        self._metrics.e2e_s.observe(self._clock.now() - record.arrival_s)


class _RequestRecord:
    def __init__(self, metrics: RouterMetrics, spec: GenerateSpec, arrival_s: float) -> None:
        self.arrival_s = arrival_s
        self._metrics = metrics
        self._num_prompt_tokens = len(spec.prompt_ids)
        self._num_unfinished = spec.n
        self._last_s: dict[int, float] = {}
        """Per choice, when its last token came."""

    def take(self, output: Output, now: float) -> None:
        metrics = self._metrics
        if not self._last_s:
            metrics.ttft_s.observe(now - self.arrival_s)
            metrics.prompt_tokens.inc(self._num_prompt_tokens)
            metrics.prompt_size.observe(self._num_prompt_tokens)
        self._observe_gaps(output, now)
        metrics.output_tokens.inc(len(output.tokens))
        if output.finish_reason is not None:
            self._num_unfinished -= 1
            metrics.finished(output.finish_reason)
            metrics.output_size.observe(output.num_output_tokens)

    def abandoned(self) -> None:
        for _ in range(self._num_unfinished):
            self._metrics.finished("abort")

    def _observe_gaps(self, output: Output, now: float) -> None:
        """Tokens that came together share the time since the ones before them."""
        before = self._last_s.get(output.index)
        self._last_s[output.index] = now
        if before is None or not output.tokens:
            return
        gap_s = (now - before) / len(output.tokens)
        if output.seq == 1:
            self._metrics.second_token_gap_s.observe(gap_s)
        for _ in output.tokens:
            self._metrics.gap_s.observe(gap_s)
