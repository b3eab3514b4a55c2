"""What one sequence's failure costs the others, and what is remembered of it."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import zmq.asyncio

from baton.engine.executor import Executor
from baton.engine.plan import FailedSequence, StepPlan, StepResult
from baton.engine.structured.grammar import Vocabulary
from baton.engine.structured.store import GrammarStore
from baton.protocol.clock import MonotonicClock
from baton.protocol.errors import InternalError
from baton.protocol.messages import (
    Abort,
    HelloReply,
    LoadReport,
    RequestFailed,
    TokenAck,
    TokenAckItem,
    TokenBatch,
)
from baton.worker.events import RunStep, ShellFacts, StepDone, StepRaised, StepWanted, ToRouter
from baton.worker.shell import WorkerShell
from tests.support.byte_tokenizer import EOS_ID, VOCAB_SIZE, write_byte_tokenizer
from tests.support.core import body, run_plan
from tests.support.deciders import Decode
from tests.support.tiny_checkpoint import write_checkpoint
from tests.unit.worker.test_grammar_gate import dispatch, worker

FACTS = ShellFacts(0, 0, "", 0)
NAMES = {"prefill": "p-0", "mixed": "d-0"}


def failures(instructions: list[Any]) -> dict[str, RequestFailed]:
    said = [i.message for i in instructions if isinstance(i, ToRouter)]
    return {m.request_id: m for m in said if isinstance(m, RequestFailed)}


def hit_tokens(w: Any) -> int:
    return cast("int", w.decider.report(FACTS).num_cache_hit_tokens)


@pytest.mark.parametrize("role", ["prefill", "mixed"])
@pytest.mark.parametrize("retryable", [True, False])
def test_blocks_of_a_sequence_with_doubtful_kv_are_found_by_nobody(
    role: str, retryable: bool
) -> None:
    """Its first chunk was published in a step before; the one that fails is the next."""
    w = worker(role)
    w.tell(dispatch(role, body("a", 20)))
    w.step()
    [plan] = [i.plan for i in w(StepWanted()) if isinstance(i, RunStep)]
    stuck = FailedSequence("a/0", "internal", "stuck", retryable)
    done = w(StepDone(dataclasses.replace(run_plan(plan), failed=(stuck,))))
    assert failures(done)["a"] == RequestFailed(
        "a", 0, "internal", "stuck", retryable, role, NAMES[role] if retryable else ""
    )
    assert not any(isinstance(i.message, TokenBatch) for i in done if isinstance(i, ToRouter))
    assert w.decider.report(FACTS).integrity_errors == ()
    assert hit_tokens(w) == 0
    w.tell(dispatch(role, body("b", 20)))
    w.step()
    assert hit_tokens(w) == (0 if retryable else 16), "the fault of a request is no fault of its KV"


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_kv_is_doubted_although_the_request_was_aborted_meanwhile(role: str) -> None:
    w = worker(role)
    w.tell(dispatch(role, body("a", 20)))
    w.step()
    [plan] = [i.plan for i in w(StepWanted()) if isinstance(i, RunStep)]
    w.tell(Abort("a", 0))
    stuck = FailedSequence("a/0", "internal", "stuck", True)
    done = w(StepDone(dataclasses.replace(run_plan(plan), failed=(stuck,))))
    assert failures(done) == {}
    w.tell(dispatch(role, body("b", 20)))
    w.step()
    assert hit_tokens(w) == 0


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_a_step_that_one_sequence_made_raise_is_not_held_against_the_others(role: str) -> None:
    w = worker(role)
    for name in ("a", "b"):
        w.tell(dispatch(role, body(name)))
    w(StepWanted())
    said = failures(w(StepRaised("a/0: a chunk without tokens", "a/0")))
    assert (said["a"].message, said["a"].suspect) == ("a/0: a chunk without tokens", NAMES[role])
    assert (said["b"].retryable, said["b"].suspect) == (True, "")
    assert "a/0" not in said["b"].message


def drawn(instructions: list[Any]) -> list[int]:
    batches = [i.message for i in instructions if isinstance(i, ToRouter)]
    items = [item for b in batches if isinstance(b, TokenBatch) for item in b.items]
    return [token_id for item in items for token_id in item.token_ids]


def test_kv_that_was_damaged_in_the_cache_costs_one_attempt(tmp_path: Path) -> None:
    """The next one computes it anew, on the same worker if need be, and draws what is right."""
    w = Decode("mixed")
    executor = Executor.load(
        write_checkpoint(tmp_path),
        dtype="float32",
        device="cpu",
        num_blocks=w.pool.num_blocks,
        block_size=w.pool.block_size,
        num_threads=1,
    )

    def run(request_id: str, attempt: int = 0) -> list[Any]:
        w.tell(dispatch("mixed", body(request_id, 20, attempt=attempt, max_tokens=3)))
        came = []
        while steps := w(StepWanted()):
            came += w(StepDone(executor.execute(steps[0].plan)))
        return came

    right = drawn(run("a"))
    assert len(right) == 3
    with torch.inference_mode():
        executor._cache.blocks.fill_(float("nan"))
    said = run("b")
    assert hit_tokens(w) == 16, "it is the damaged KV that it read"
    assert drawn(said) == []
    assert failures(said)["b"].retryable
    assert drawn(run("b", 1)) == right
    assert hit_tokens(w) == 16
    w.tell(TokenAck(tuple(TokenAckItem(*of, 3) for of in (("a", 0), ("b", 1)))))
    w.idle()


class OneStep:
    """A decider that wants a step once, and keeps what came of it."""

    has_step_in_flight = False
    num_open = 0

    def __init__(self) -> None:
        self.came: asyncio.Queue[object] = asyncio.Queue()

    def handle(self, event: object, now: float) -> list[object]:
        if isinstance(event, StepWanted) and not self.has_step_in_flight:
            self.has_step_in_flight = True
            return [RunStep(StepPlan(3, ()))]
        if isinstance(event, StepRaised | StepDone):
            self.came.put_nowait(event)
        return []

    def report(self, facts: ShellFacts) -> LoadReport:
        raise AssertionError("no router is here")


class Raising:
    def __init__(self, error: Exception) -> None:
        self._error = error

    def execute(self, plan: StepPlan) -> StepResult:
        raise self._error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InternalError("r/0: no", request_id="r/0"), ("InternalError: r/0: no", "r/0")),
        (ValueError("boom"), ("ValueError: boom", "")),
    ],
)
async def test_the_shell_says_and_logs_who_made_a_step_raise(
    error: Exception,
    expected: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    vocabulary = Vocabulary(write_byte_tokenizer(tmp_path), VOCAB_SIZE, (EOS_ID,))

    def describe(hello: object, version: int) -> HelloReply:
        raise AssertionError("nobody connects")

    decider = OneStep()
    context = zmq.asyncio.Context()
    try:
        shell = WorkerShell(
            context,
            decider,
            Raising(error),
            MonotonicClock(),
            describe=describe,
            perform=lambda instruction: None,
            facts=lambda: FACTS,
            grammars=GrammarStore(vocabulary),
        )
        shell.server.bind("127.0.0.1")
        running = asyncio.create_task(shell.run())
        shell.feed("anything")
        raised = await asyncio.wait_for(decider.came.get(), 10)
        running.cancel()
        await asyncio.wait([running])
        assert running.cancelled()
    finally:
        context.destroy(linger=0)
    message, seq_id = expected
    assert raised == StepRaised(f"the engine step raised {message}", seq_id)
    [logged] = [r for r in caplog.records if "raised" in r.message]
    assert logged.message == f"step 3 raised; to blame: {seq_id or 'unknown'}"
    assert logged.exc_info is not None
