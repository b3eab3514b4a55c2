"""A worker's report of its load and of the state of its books. Pure."""

from __future__ import annotations

from baton.engine.scheduler import Scheduler
from baton.protocol.messages import MAX_KV_LINKS, LoadReport
from baton.worker.events import ShellFacts


def load_report(
    worker_id: str,
    incarnation: str,
    role: str,
    scheduler: Scheduler,
    facts: ShellFacts,
    *,
    num_at_gate: int,
    num_transfers: int,
    num_parked: int,
    num_reservations_blocked: int,
    is_idle: bool,
) -> LoadReport:
    """is_idle: nothing is open, so every block must be free and is looked at."""
    counts, pool = scheduler.counts, scheduler.pool
    return LoadReport(
        worker_id=worker_id,
        incarnation=incarnation,
        role=role,
        num_running=scheduler.num_running,
        num_waiting=scheduler.num_waiting + num_at_gate,
        num_waiting_tokens=scheduler.num_waiting_tokens,
        num_blocks=pool.num_blocks,
        num_free_blocks=pool.num_free,
        block_size=pool.block_size,
        num_transfers=num_transfers,
        num_parked=num_parked,
        num_preemptions=counts.num_preemptions,
        num_backpressured=counts.num_blocked + num_reservations_blocked,
        kv_bytes_sent=facts.kv_bytes_sent,
        kv_bytes_received=facts.kv_bytes_received,
        kv_transport=facts.kv_transport,
        num_leases=num_transfers,
        num_tasks=facts.num_tasks,
        step_count=scheduler.num_steps,
        integrity_errors=tuple(_leftovers(scheduler)) if is_idle else (),
        num_swapped_out=counts.num_swapped_out,
        num_cache_queried_tokens=counts.num_cache_queried_tokens,
        num_cache_hit_tokens=counts.num_cache_hit_tokens,
        num_draft_tokens=counts.num_draft_tokens,
        num_accepted_draft_tokens=counts.num_accepted_draft_tokens,
        kv_links=facts.kv_links[:MAX_KV_LINKS],
    )


def _leftovers(scheduler: Scheduler) -> list[str]:
    problems = scheduler.check_integrity()
    if scheduler.pool.owners:
        problems.append(f"blocks left with {sorted(scheduler.pool.owners)[:4]}")
    return problems
