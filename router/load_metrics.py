"""What ``Frontend.loads`` says, as Prometheus metrics, read at scrape time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from router.frontend import Frontend, WorkerLoad

MAX_WORKERS = 1_000
"""Beyond it further workers are left out, so that the label set stays bounded."""


@dataclass(frozen=True, slots=True)
class _WorkerMetric:
    name: str
    help: str
    value: Callable[[WorkerLoad], float]
    is_counter: bool = False


_OF_WORKERS = (
    _WorkerMetric(
        "kv_cache_usage_perc",
        "Share of KV blocks in use, 0 to 1.",
        lambda w: 1 - w.num_free_blocks / max(w.num_blocks, 1),
    ),
    _WorkerMetric("worker_num_requests_running", "In the batch.", lambda w: w.num_running),
    _WorkerMetric("worker_num_requests_waiting", "In the worker's queue.", lambda w: w.num_waiting),
    _WorkerMetric("worker_num_parked", "KV kept until its taker has room.", lambda w: w.num_parked),
    _WorkerMetric("worker_num_leases", "Reservations and exports held.", lambda w: w.num_leases),
    _WorkerMetric("worker_num_tasks", "Running asyncio tasks.", lambda w: w.num_tasks),
    _WorkerMetric(
        "worker_integrity_errors",
        "Broken sums in the worker's own books, leaked KV blocks among them; 0 when sound.",
        lambda w: len(w.integrity_errors),
    ),
    _WorkerMetric("worker_report_age_seconds", "Since the last report.", lambda w: w.age_s),
    _WorkerMetric("num_preemptions", "Requests preempted.", lambda w: w.num_preemptions, True),
    _WorkerMetric(
        "num_swapped_out",
        "Of the preemptions, those whose KV went to host memory.",
        lambda w: w.num_swapped_out,
        True,
    ),
    _WorkerMetric(
        "prefix_cache_queries",
        "Tokens looked up in the prefix cache.",
        lambda w: w.num_cache_queried_tokens,
        True,
    ),
    _WorkerMetric(
        "prefix_cache_hits",
        "Of the tokens looked up in the prefix cache, those that it held.",
        lambda w: w.num_cache_hit_tokens,
        True,
    ),
    _WorkerMetric(
        "spec_decode_num_draft_tokens",
        "Tokens guessed and verified.",
        lambda w: w.num_draft_tokens,
        True,
    ),
    _WorkerMetric(
        "spec_decode_num_accepted_tokens",
        "Of the tokens guessed, those that proved right.",
        lambda w: w.num_accepted_draft_tokens,
        True,
    ),
    _WorkerMetric(
        "num_backpressured", "Times that a sender had to wait.", lambda w: w.num_backpressured, True
    ),
    _WorkerMetric("kv_sent_bytes", "KV bytes sent.", lambda w: w.kv_bytes_sent, True),
    _WorkerMetric("kv_received_bytes", "KV bytes received.", lambda w: w.kv_bytes_received, True),
    _WorkerMetric(
        "kv_handovers_predicted",
        "Hand-overs whose end was predicted when they began to be sent.",
        lambda w: sum(link.num_predicted for link in w.kv_links),
        True,
    ),
    _WorkerMetric(
        "kv_handover_predicted_seconds",
        "What they were predicted to take.",
        lambda w: sum(link.predicted_s for link in w.kv_links),
        True,
    ),
    _WorkerMetric(
        "kv_handover_actual_seconds",
        "What they took.",
        lambda w: sum(link.actual_s for link in w.kv_links),
        True,
    ),
    _WorkerMetric(
        "kv_handover_error_seconds",
        "What predictions were off by.",
        lambda w: sum(link.error_s for link in w.kv_links),
        True,
    ),
    _WorkerMetric("worker_steps", "Forward steps.", lambda w: w.step_count, True),
)


class LoadCollector(Collector):
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not ask the front end for loads."""
        return []

    def collect(self) -> Iterable[Metric]:
        loads = self._frontend.loads()
        model = self._frontend.model.name
        yield _gauge(
            "num_requests_running", "Requests with a first token.", model, loads.num_running
        )
        yield _gauge("num_requests_waiting", "Requests without one.", model, loads.num_queued)
        yield _gauge(
            "ready", "1 when requests can be served.", model, self._frontend.ready() is None
        )
        workers = loads.workers[:MAX_WORKERS]
        for metric in _OF_WORKERS:
            kind = CounterMetricFamily if metric.is_counter else GaugeMetricFamily
            family = kind(
                f"baton:{metric.name}", metric.help, labels=["model_name", "role", "worker"]
            )
            for worker in workers:
                family.add_metric([model, worker.role, worker.worker_id], metric.value(worker))
            yield family


def _gauge(name: str, text: str, model: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"baton:{name}", text, labels=["model_name"])
    family.add_metric([model], value)
    return family
