"""Structured output at the workers' deciders: held until compiled, failed alone."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from typing import Any

import msgspec
import pytest

from baton.engine.plan import FailedSequence
from baton.engine.sequence import Sequence
from baton.protocol.constraint import Constraint
from baton.protocol.messages import (
    Abort,
    Denied,
    Dispatch,
    RequestBody,
    TokenBatch,
    TransferCancel,
)
from baton.protocol.sampling import SamplingParams
from baton.worker.events import (
    CompileGrammar,
    ForgetGrammar,
    FromPeer,
    GrammarFailed,
    GrammarReady,
    RunStep,
    StepDone,
    StepRaised,
    StepWanted,
    Tick,
    ToRouter,
)
from baton.worker.grammar_gate import GrammarGate
from tests.support.core import DECODE, body, run_plan
from tests.support.deciders import PREFILL_PEER, Decode, Prefill, end, failure, frame

DIGITS = Constraint("regex", "[0-9]+")
WORDS = Constraint("regex", "[a-z]+")


def constrained(request_id: str = "r", constraint: Constraint = DIGITS) -> RequestBody:
    made = body(request_id)
    sampling = msgspec.structs.replace(made.sampling, constraint=constraint)
    return msgspec.structs.replace(made, sampling=sampling)


def worker(role: str) -> Prefill | Decode:
    return Prefill() if role == "prefill" else Decode("mixed")


def dispatch(role: str, request: RequestBody) -> Dispatch:
    return Dispatch(request, DECODE if role == "prefill" else None)


def test_the_gate_gives_back_what_waited_for_one_grammar_in_order() -> None:
    gate = GrammarGate()
    sequences = [
        Sequence(str(n), (1,), [], SamplingParams(constraint=c))
        for n, c in enumerate([DIGITS, WORDS, DIGITS, DIGITS])
    ]
    for sequence in sequences:
        assert gate.hold(sequence) == [CompileGrammar(sequence.sampling.constraint)]
    assert gate.drop("2") is sequences[2]
    assert gate.drop("2") is None
    assert gate.open(DIGITS) == [sequences[0], sequences[3]]
    assert gate.open(DIGITS) == []
    assert ("1" in gate, "0" in gate, len(gate)) == (True, False, 1)
    assert gate.deserted() == [], "somebody waited for each of them until the answer"


def waiting(name: str, constraint: Constraint = DIGITS) -> Sequence:
    return Sequence(name, (1,), [], SamplingParams(constraint=constraint))


def test_what_the_last_one_leaves_is_taken_back_once() -> None:
    gate = GrammarGate()
    gate.hold(waiting("a"))
    gate.expect("b", DIGITS)
    gate.hold(waiting("c", WORDS))
    gate.drop("a")
    assert gate.deserted() == [], "b is still to come"
    assert gate.drop("b") is None
    gate.drop("b")
    gate.drop("c")
    assert gate.deserted() == [ForgetGrammar(DIGITS), ForgetGrammar(WORDS)]
    assert gate.deserted() == []


def test_what_is_wanted_again_at_once_is_not_taken_back() -> None:
    gate = GrammarGate()
    gate.hold(waiting("a"))
    gate.drop("a")
    gate.hold(waiting("b"))
    assert gate.deserted() == []
    gate.drop("b")
    assert gate.deserted() == [ForgetGrammar(DIGITS)]


def test_one_that_was_expected_is_held_in_its_place_or_let_go() -> None:
    gate = GrammarGate()
    gate.expect("a", DIGITS)
    gate.expect("b", DIGITS)
    assert (len(gate), gate.expected, "a" in gate) == (0, ["a", "b"], False)
    gate.hold(waiting("c"))
    held = waiting("a")
    gate.hold(held)
    assert (len(gate), gate.expected) == (2, ["b"])
    opened = gate.open(DIGITS, "compiled")
    assert opened[0] is held
    assert [(s.seq_id, s.grammar) for s in opened] == [("a", "compiled"), ("c", "compiled")]
    assert gate.expected == []
    assert gate.deserted() == []


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_a_request_waits_for_its_grammar_and_no_other(role: str) -> None:
    w = worker(role)
    assert w.tell(dispatch(role, constrained())) == [CompileGrammar(DIGITS)]
    assert w.tell(dispatch(role, constrained())) == [], "the same dispatch again"
    assert w(StepWanted()) == []
    assert w.report().num_waiting == 1
    assert w(GrammarReady(WORDS)) == []
    assert w(StepWanted()) == []
    w(GrammarReady(DIGITS))
    assert isinstance(w(StepWanted())[0], RunStep)


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_a_grammar_that_fails_costs_those_that_wanted_it(role: str) -> None:
    w = worker(role)
    for name, constraint in (("a", DIGITS), ("b", WORDS), ("c", DIGITS)):
        w.tell(dispatch(role, constrained(name, constraint)))
    assert w(GrammarFailed(DIGITS, "invalid_request", "no", False)) == [
        failure(role, "invalid_request", "no", False, request_id="a"),
        failure(role, "invalid_request", "no", False, request_id="c"),
    ]
    assert w.decider.num_open == 1
    w(GrammarReady(WORDS))
    assert [c.seq_id for c in w(StepWanted())[0].plan.chunks] == ["b/0"]


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_what_is_aborted_or_late_at_the_gate_is_gone(role: str) -> None:
    w = worker(role)
    w.tell(dispatch(role, constrained("a")))
    w.tell(dispatch(role, constrained("b")))
    assert w.tell(Abort("a", 0)) == []
    assert w.decider.num_open == 1
    assert ForgetGrammar(DIGITS) in w(Tick(), 601.0)
    assert w.decider.num_open == 0
    w(GrammarReady(DIGITS))
    assert w(StepWanted()) == []
    assert w.report().integrity_errors == ()


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_a_sequence_that_cannot_go_on_takes_no_other_with_it(role: str) -> None:
    w = worker(role)
    for name in ("a", "b"):
        w.tell(dispatch(role, body(name)))
    result = run_plan(w(StepWanted())[0].plan)
    stuck = FailedSequence("a/0", "invalid_request", "stuck")
    done = w(StepDone(dataclasses.replace(result, failed=(stuck,))))
    assert failure(role, "invalid_request", "stuck", False, request_id="a") in done
    batches = [i.message for i in done if isinstance(i, ToRouter)]
    told = [item.request_id for b in batches if isinstance(b, TokenBatch) for item in b.items]
    assert told == ["b"]
    assert w.decider.num_open == 2, "b's stream, and b itself or its hand-over"


def handed_over(decode: Decode) -> list[Any]:
    """A request with a constraint, up to the commit of its KV."""
    request = constrained()
    assert decode.reserve(request)[0] == CompileGrammar(DIGITS), "while its KV is on its way"
    decode.frame(frame(request, 1))
    return decode(end(request, 1, 42))


def test_a_sequence_that_arrives_before_its_grammar_keeps_its_blocks() -> None:
    decode = Decode()
    assert CompileGrammar(DIGITS) in handed_over(decode)
    assert decode(StepWanted()) == []
    assert decode.reserve(constrained()) == [], "asked again meanwhile"
    decode(GrammarReady(DIGITS))
    [chunk] = decode(StepWanted())[0].plan.chunks
    assert (chunk.token_ids, chunk.start) == ((42,), 4)


@pytest.mark.parametrize("ends", [GrammarFailed(DIGITS, "internal", "no", True), Abort("r", 0)])
def test_blocks_of_a_sequence_that_ends_at_the_gate_are_freed(ends: Any) -> None:
    decode = Decode()
    handed_over(decode)
    if isinstance(ends, Abort):
        decode.tell(ends)
    else:
        assert decode(ends) == [failure("decode", "internal", "no", True)]
    decode.idle()


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_the_grammar_of_an_aborted_request_is_taken_back(role: str) -> None:
    w = worker(role)
    w.tell(dispatch(role, constrained()))
    assert ForgetGrammar(DIGITS) in w.tell(Abort("r", 0))
    assert w(Tick(), 0.1) == []


@pytest.mark.parametrize("role", ["prefill", "mixed"])
def test_a_sequence_holds_its_grammar_from_the_answer_to_its_end(role: str) -> None:
    class Compiled:
        """Something that can be seen to go."""

    w, compiled = worker(role), Compiled()
    is_here = weakref.ref(compiled)
    w.tell(dispatch(role, constrained()))
    w(GrammarReady(DIGITS, compiled))
    del compiled
    assert is_here() is not None
    w(StepWanted())
    w.tell(Abort("r", 0))
    gc.collect()
    assert is_here() is not None, "the step in flight runs it"
    w(StepRaised("the end of the step"))
    w.tell(dispatch(role, body("another")))
    w(StepWanted())
    gc.collect()
    assert is_here() is None


@pytest.mark.parametrize(
    "ends",
    [
        FromPeer("router-0|1", "router-0", "router", Abort("r", 0)),
        FromPeer(PREFILL_PEER, "p-0", "prefill", TransferCancel("r/0")),
        Tick(),
    ],
)
def test_the_grammar_of_a_transfer_that_ends_is_taken_back(ends: Any) -> None:
    """A tick finds the lease expired."""
    decode = Decode()
    assert decode.reserve(constrained())[0] == CompileGrammar(DIGITS)
    assert ForgetGrammar(DIGITS) in decode(ends, 11.0)
    assert ForgetGrammar(DIGITS) not in decode(Tick(), 11.1)
    decode.idle()


def test_a_cancel_that_comes_behind_the_commit_leaves_the_sequence_at_the_gate() -> None:
    """The prefill worker was told of an abort before it heard of the commit."""
    decode = Decode()
    handed_over(decode)
    assert decode.prefill(TransferCancel("r/0")) == []
    assert decode.report().num_waiting == 1
    decode(GrammarReady(DIGITS))
    [chunk] = decode(StepWanted())[0].plan.chunks
    assert chunk.seq_id == "r/0"
    decode(StepRaised("the end of the step"))
    decode.idle()


def test_a_transfer_that_is_denied_asks_for_no_grammar() -> None:
    decode = Decode(num_blocks=1)
    answers = decode.reserve(msgspec.structs.replace(constrained(), prompt_ids=tuple(range(8))))
    assert [type(a.message) for a in answers] == [Denied]


def test_a_grammar_that_is_ready_before_the_kv_is_not_taken_back() -> None:
    decode = Decode()
    decode.reserve(constrained())
    assert decode(GrammarReady(DIGITS)) == []
    assert ForgetGrammar(DIGITS) not in decode.tell(Abort("r", 0))
