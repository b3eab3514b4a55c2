"""The table of a worker's requests: who begins, who is meant, who is over."""

from __future__ import annotations

from baton.engine.block_pool import BlockPool
from baton.engine.plan import StepPlan
from baton.engine.scheduler import Scheduler
from baton.worker.jobs import Job, Jobs, sequence_of
from tests.support.core import EOS_ID, body, engine_config, run_plan


class Table:
    """Jobs and their scheduler, and steps of it."""

    def __init__(self) -> None:
        config = engine_config()
        self.scheduler = Scheduler(
            BlockPool(config.num_blocks, config.block_size), config, frozenset([EOS_ID])
        )
        self.jobs: Jobs[Job] = Jobs(self.scheduler)

    def start(self, request_id: str, attempt: int = 0, router_id: str = "router-0") -> str:
        request = body(request_id, attempt=attempt, router_id=router_id, deadline_in_s=5.0)
        seq_id = f"{request_id}/{attempt}"
        assert self.jobs.start(Job(request, 0.0, 5.0), sequence_of(seq_id, request)) == []
        return seq_id

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule()
        assert plan is not None
        return plan


def test_a_job_begins_once() -> None:
    table = Table()
    table.start("a")
    plan = table.plan()
    [(seq_id, job)] = table.jobs.begin(plan, 1.0)
    assert (seq_id, job.started_at) == ("a/0", 1.0)
    table.scheduler.complete(run_plan(plan))
    table.start("b")
    assert [seq_id for seq_id, _ in table.jobs.begin(table.plan(), 2.0)] == ["b/0"]
    assert job.started_at == 1.0


def test_an_attempt_means_itself_and_older_ones_of_its_request() -> None:
    table = Table()
    for attempt in range(3):
        table.start("a", attempt)
    table.start("b")
    assert table.jobs.of_request("a", 1) == ["a/0", "a/1"]
    assert table.jobs.of_request("c", 9) == []


def test_who_is_late_and_who_lost_its_router() -> None:
    table = Table()
    table.start("a")
    table.start("b", router_id="router-1")
    assert table.jobs.lapsed([], 5.0) == []
    assert table.jobs.lapsed(["router-1"], 5.0) == [("b/0", False)]
    assert table.jobs.lapsed(["router-1"], 5.1) == [("a/0", True), ("b/0", False)], "once each"


def test_one_that_is_dropped_is_known_until_its_step_is_over() -> None:
    table = Table()
    seq_id = table.start("a")
    plan = table.plan()
    table.jobs.drop(seq_id)
    assert seq_id not in table.jobs
    assert table.jobs.is_known(seq_id)
    table.scheduler.complete(run_plan(plan))
    assert not table.jobs.is_known(seq_id)
    assert table.scheduler.pool.owners == frozenset()


def test_a_sequence_begins_as_its_request_says_and_is_its_own() -> None:
    request = body("a", output=(7, 8), priority=2)
    sequence = sequence_of("a/0", request)
    assert (sequence.prompt_ids, sequence.output_ids, sequence.priority) == (
        request.prompt_ids,
        [7, 8],
        2,
    )
    sequence.output_ids.append(9)
    assert request.output_ids == (7, 8)
