"""``assert decider.handle(event, now) == [instructions]`` along the ways of a request."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from baton.protocol.config import RouterConfig
from baton.protocol.errors import (
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    RequestConflict,
    TransferFailed,
    Unavailable,
)
from baton.protocol.ids import RequestId
from baton.protocol.messages import (
    Abort,
    Dispatch,
    HelloReply,
    LoadReport,
    RequestBody,
    RequestFailed,
    TokenAck,
    TokenAckItem,
    TokenBatch,
    TokenItem,
    WorkerRef,
)
from baton.protocol.sampling import SamplingParams, TokenLogprobs
from baton.protocol.spec import WorkerInfo
from router.decider import QUEUE_PATIENCE_S, RouterDecider
from router.detokenizer import Detokenizer
from router.events import (
    Announced,
    ClientAbort,
    Connect,
    Deliver,
    Disconnect,
    DrainAll,
    Failure,
    FromWorker,
    Gone,
    Greeted,
    Tick,
    ToWorker,
)
from router.frontend import GenerateSpec, Output
from router.tick_watch import TickWatch
from tests.support.tiny_text import END_ID, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
A, B, C = (64 + i for i in range(3))
"""Ids of the letters a, b, c."""
CAPACITY = 1_000


def info(worker_id: str, incarnation: str = "1", role: str = "") -> WorkerInfo:
    role = role or {"p": "prefill", "d": "decode", "m": "mixed"}[worker_id[0]]
    return WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        role=role,
        address=f"tcp://{worker_id}",
        pid=1,
    )


def spec(request_id: str = "r", **fields: Any) -> GenerateSpec:
    sampling = SamplingParams(
        max_tokens=fields.pop("max_tokens", 4),
        seed=fields.pop("seed", 0),
        num_prompt_logprobs=fields.pop("num_prompt_logprobs", -1),
    )
    prompt_ids = (1, 2, 3)
    return GenerateSpec(RequestId(request_id), prompt_ids, sampling, **fields)


class Router:
    def __init__(self, *workers: str, is_deterministic: bool = False, **config: Any) -> None:
        self.decider = RouterDecider(
            "router-0",
            1,
            RouterConfig(**config),
            lambda s: Detokenizer(TOKENIZER, s.stop, s.skip_special_tokens),
            is_deterministic=is_deterministic,
        )
        for worker in workers:
            self.up(worker)

    def __call__(self, event: Any, now: float = 0.0) -> list[Any]:
        return self.decider.handle(event, now)

    def up(
        self, worker: str, incarnation: str = "1", now: float = 0.0, fingerprint: str = "fp"
    ) -> list[Any]:
        said = self(Announced(info(worker, incarnation)), now)
        return said + self(Greeted(worker, reply(worker, incarnation, fingerprint)), now)

    def submit(self, request: GenerateSpec, now: float = 0.0) -> list[Any]:
        return self.decider.submit(request, now)

    def dispatched(self, request: GenerateSpec, now: float = 0.0) -> list[ToWorker]:
        said = self.submit(request, now)
        assert all(isinstance(i.message, Dispatch) for i in said)
        return said

    def tokens(self, worker: str, *items: TokenItem, now: float = 0.0) -> list[Any]:
        return self(FromWorker(worker, TokenBatch(worker, "1", items)), now)

    @property
    def charges(self) -> dict[str, int]:
        return {m.worker_id: m.charged_tokens for m in self.decider._members}

    def idle(self) -> None:
        assert self.decider.num_open == 0
        assert set(self.charges.values()) <= {0}


def reply(worker: str, incarnation: str = "1", fingerprint: str = "fp") -> HelloReply:
    return HelloReply("", 1, worker, incarnation, info(worker).role, fingerprint, "kv", CAPACITY)


def body_of(said: list[ToWorker], index: int = 0) -> RequestBody:
    message = said[index].message
    assert isinstance(message, Dispatch)
    return message.body


def item(body: RequestBody, seq: int, token_id: int, **fields: Any) -> TokenItem:
    return TokenItem(body.request_id, body.attempt, seq, (token_id,), **fields)


def ack(body: RequestBody, next_seq: int) -> TokenAck:
    return TokenAck((TokenAckItem(body.request_id, body.attempt, next_seq),))


def outputs(said: list[Any]) -> list[Output]:
    return [i.output for i in said if isinstance(i, Deliver)]


def failed(body: RequestBody, code: str, retryable: bool, suspect: str = "") -> RequestFailed:
    return RequestFailed(body.request_id, body.attempt, code, "why", retryable, "prefill", suspect)


def test_a_request_is_placed_on_a_pair_and_followed_to_its_end() -> None:
    router = Router("p-0", "d-0")
    [sent] = router.dispatched(spec(max_tokens=2), 1.0)
    body = body_of([sent])
    decode = WorkerRef("d-0", "1", "tcp://d-0")
    assert sent == ToWorker("p-0", Dispatch(body, decode))
    assert (body.prompt_ids, body.output_ids, body.attempt) == ((1, 2, 3), (), 0)
    assert router.charges == {"p-0": 3, "d-0": 3 + 2}
    said = router.tokens("p-0", item(body, 0, A), now=2.0)
    assert said[0] == ToWorker("p-0", ack(body, 1))
    [first] = outputs(said)
    assert (first.seq, first.text, first.finish_reason) == (0, "a", None)
    assert router.charges == {"p-0": 0, "d-0": 5}
    said = router.tokens("d-0", item(body, 1, B, finish_reason="length"), now=3.0)
    assert said[0] == ToWorker("d-0", ack(body, 2))
    [last] = outputs(said)
    assert len(said) == 2, "no abort: the worker knows"
    assert (last.seq, last.text, last.finish_reason) == (1, "b", "length")
    assert (last.num_prompt_tokens, last.num_output_tokens) == (3, 2)
    assert last.timeline is not None
    assert (last.timeline.ttft_ms, last.timeline.tpot_ms) == (1_000.0, 1_000.0)
    router.idle()


def test_a_mixed_worker_gets_the_whole_request() -> None:
    router = Router("m-0")
    [sent] = router.dispatched(spec())
    assert sent == ToWorker("m-0", Dispatch(body_of([sent]), None))
    said = router.tokens("m-0", item(body_of([sent]), 0, END_ID, finish_reason="stop"))
    [last] = outputs(said)
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", None)
    router.idle()


def test_tokens_that_overtake_wait_and_repeated_ones_are_dropped() -> None:
    router = Router("p-0", "d-0")
    body = body_of(router.dispatched(spec(max_tokens=3)))
    second = item(body, 1, B)
    assert router.tokens("d-0", second) == [ToWorker("d-0", ack(body, 0))]
    said = router.tokens("p-0", item(body, 0, A))
    assert [(o.seq, o.text) for o in outputs(said)] == [(0, "a"), (1, "b")]
    assert said[0] == ToWorker("p-0", ack(body, 2))
    assert router.tokens("d-0", second) == [ToWorker("d-0", ack(body, 2))]
    third = item(body, 2, C, finish_reason="length")
    assert outputs(router.tokens("d-0", third))[0].finish_reason == "length"
    assert router.tokens("d-0", third) == [ToWorker("d-0", ack(body, 3))], "acknowledged again"
    router.idle()


def test_tokens_that_nobody_wants_are_acknowledged_and_stopped() -> None:
    router = Router("p-0", "d-0")
    stranger = TokenItem("gone", 2, 7, (A,))
    assert router.tokens("d-0", stranger) == [
        ToWorker("d-0", TokenAck((TokenAckItem("gone", 2, 8),))),
        ToWorker("d-0", Abort("gone", 2)),
    ]
    old_life = TokenBatch("d-0", "0", (stranger,))
    assert router(FromWorker("d-0", old_life)) == []


def test_a_stop_string_ends_it_here_and_aborts_at_both_workers() -> None:
    router = Router("p-0", "d-0")
    body = body_of(router.dispatched(spec(stop=("bc",), max_tokens=9)))
    router.tokens("p-0", item(body, 0, A))
    [held] = outputs(router.tokens("d-0", item(body, 1, B)))
    assert (held.text, held.num_output_tokens) == ("", 2)
    said = router.tokens("d-0", item(body, 2, C), item(body, 3, A))
    [last] = outputs(said)
    assert (last.text, last.finish_reason, last.stop_reason) == ("", "stop", "bc")
    aborts = [i for i in said if isinstance(i, ToWorker) and isinstance(i.message, Abort)]
    abort = Abort(body.request_id, 0)
    assert aborts[:2] == [ToWorker("d-0", abort), ToWorker("p-0", abort)]
    router.idle()


def test_a_stop_token_is_named_and_not_shown() -> None:
    router = Router("m-0")
    body = body_of(router.dispatched(spec()))
    said = router.tokens("m-0", item(body, 0, C, finish_reason="stop", stop_token_id=C))
    [last] = outputs(said)
    assert (last.text, last.stop_reason, last.num_output_tokens) == ("", C, 1)


def test_choices_of_one_request_are_placed_apart_and_end_alone() -> None:
    router = Router("m-0", "m-1")
    sent = router.dispatched(spec(n=2, max_tokens=1, seed=5))
    assert [i.worker_id for i in sent] == ["m-0", "m-1"]
    bodies = [body_of(sent, 0), body_of(sent, 1)]
    assert [b.sampling.seed for b in bodies] == [5, 6]
    assert bodies[0].request_id != bodies[1].request_id
    for index, worker in ((1, "m-1"), (0, "m-0")):
        assert router.decider.num_open == index + 1
        said = router.tokens(worker, item(bodies[index], 0, A, finish_reason="length"))
        assert outputs(said)[0].index == index
    router.idle()


def test_a_floor_for_its_kv_goes_with_every_choice() -> None:
    router = Router("m-0")
    said = router.dispatched(spec(n=2, kv_quality="high"))
    assert {body_of(said).kv_quality, body_of(said, 1).kv_quality} == {"high"}


def test_a_cache_salt_goes_with_every_choice_and_every_attempt() -> None:
    router = Router("m-0", "m-1")
    said = router.dispatched(spec(n=2, cache_salt="mine"))
    first, second = body_of(said), body_of(said, 1)
    assert (first.tenant, second.tenant) == ("mine", "mine")
    said = router(FromWorker(said[0].worker_id, failed(first, "worker_lost", True)), 1.0)
    [again] = [i.message.body for i in said if isinstance(i.message, Dispatch)]
    assert (again.attempt, again.tenant) == (1, "mine")
    assert body_of(router.dispatched(spec("other"))).tenant == ""


def test_a_retryable_failure_is_placed_elsewhere_with_what_is_there() -> None:
    router = Router("p-0", "p-1", "d-0", "d-1")
    [sent] = router.dispatched(spec())
    body = body_of([sent])
    decode = sent.message.decode.worker_id
    router.tokens(sent.worker_id, item(body, 0, A))
    said = router(FromWorker(sent.worker_id, failed(body, "transfer_failed", True, decode)), 1.0)
    abort = Abort(body.request_id, 0)
    assert said[:2] == [ToWorker(decode, abort), ToWorker(sent.worker_id, abort)]
    again = said[2].message
    assert isinstance(again, Dispatch)
    assert (again.body.attempt, again.body.output_ids) == (1, (A,))
    assert again.decode.worker_id != decode
    assert router(FromWorker("p-0", failed(body, "internal", False))) == [], "attempt 0 is over"
    late = router.tokens(decode, item(body, 1, B))
    assert late[1:] == [ToWorker(decode, abort)]
    first = said[2].worker_id
    assert [o.seq for o in outputs(router.tokens(first, item(again.body, 1, B)))] == [1]


def test_the_prompt_comes_with_the_first_output_and_once() -> None:
    router = Router("p-0", "d-0", "d-1")
    body = body_of(router.dispatched(spec(num_prompt_logprobs=0)))
    scores = (TokenLogprobs(-1.0), TokenLogprobs(-2.0))
    said = router.tokens("p-0", item(body, 0, 7, prompt_logprobs=scores))
    said += router.tokens(body_target(router), item(body, 1, 8, prompt_logprobs=scores))
    first, second = outputs(said)
    assert [(t.token_id, t.logprobs) for t in first.prompt_tokens] == [
        (1, None),
        (2, scores[0]),
        (3, scores[1]),
    ]
    assert second.prompt_tokens == ()


def body_target(router: Router) -> str:
    """The decode worker that the only request was placed on."""
    (charged,) = (w for w, tokens in router.charges.items() if tokens and w.startswith("d"))
    return charged


def test_a_failure_for_good_is_told_as_its_own_class() -> None:
    router = Router("m-0")
    body = body_of(router.dispatched(spec()))
    said = router(FromWorker("m-0", failed(body, "invalid_request", False)))
    assert said[0] == ToWorker("m-0", Abort(body.request_id, 0))
    assert isinstance(said[1], Failure)
    assert isinstance(said[1].error, InvalidRequest)
    assert (said[1].error.hop, said[1].error.request_id) == ("prefill", "r")
    router.idle()


def test_attempts_run_out_and_take_the_whole_request() -> None:
    router = Router("m-0", max_attempts=2)
    bodies = [body_of([i]) for i in router.dispatched(spec(n=2))]
    first = router(FromWorker("m-0", failed(bodies[0], "internal", True)))
    again = body_of([first[-1]])
    said = router(FromWorker("m-0", failed(again, "internal", True)))
    [failure] = [i for i in said if isinstance(i, Failure)]
    assert isinstance(failure.error, InternalError)
    assert failure.error.retryable
    assert "why (attempt 2 of 2)" in failure.error.message
    aborted = {i.message.request_id for i in said if isinstance(i, ToWorker)}
    assert aborted == {b.request_id for b in bodies}, "the other choice, too"
    router.idle()


def test_a_lost_worker_s_requests_go_on_elsewhere() -> None:
    router = Router("p-0", "d-0", "d-1")
    sent = router.dispatched(spec("a")) + router.dispatched(spec("b"))
    decodes = [i.message.decode.worker_id for i in sent]
    assert decodes == ["d-0", "d-1"]
    a, b = body_of(sent, 0), body_of(sent, 1)
    router.tokens("p-0", item(a, 0, A), item(b, 0, A))
    said = router(Gone("d-0", "1"))
    assert said[0] == Disconnect("d-0")
    assert said[1] == ToWorker("p-0", Abort(a.request_id, 0))
    again = said[2].message
    assert (again.decode.worker_id, again.body.output_ids) == ("d-1", (A,))
    assert len(said) == 3, "b is elsewhere"
    assert router(Gone("d-0", "1")) == []
    assert router.charges["d-0"] == 0


def after_a_loss(router: Router, worker: str) -> list[str]:
    """Who gets the lost worker's requests."""
    said = router(Gone(worker, "1"))
    return [i.worker_id for i in said if isinstance(i, ToWorker) and i.worker_id != worker]


@pytest.mark.parametrize(("is_deterministic", "heirs"), [(False, ["m-1"]), (True, ["m-2"])])
def test_deterministic_tokens_are_continued_by_the_arithmetic_that_made_them(
    is_deterministic: bool, heirs: list[str]
) -> None:
    router = Router(is_deterministic=is_deterministic, placement="round_robin")
    for worker, fingerprint in (("m-0", "a"), ("m-1", "b"), ("m-2", "a")):
        router.up(worker, fingerprint=fingerprint)
    [sent] = router.dispatched(spec())
    router.tokens("m-0", item(body_of([sent]), 0, A))
    assert after_a_loss(router, "m-0") == heirs
    if is_deterministic:
        assert after_a_loss(router, "m-2") == [], "m-1 computes in another way: it waits"


def test_without_a_token_any_arithmetic_may_begin_again() -> None:
    router = Router(is_deterministic=True)
    router.up("m-0", fingerprint="a")
    router.dispatched(spec())
    router.up("m-1", fingerprint="b")
    assert after_a_loss(router, "m-0") == ["m-1"]


def test_a_lost_prefill_worker_costs_nothing_once_decoding_began() -> None:
    router = Router("p-0", "p-1", "d-0")
    body = body_of(router.dispatched(spec()))
    router.tokens("p-0", item(body, 0, A))
    router.tokens("d-0", item(body, 1, B))
    assert router(Gone("p-0", "1")) == [Disconnect("p-0")]
    assert outputs(router.tokens("d-0", item(body, 2, C)))[0].seq == 2


def test_a_restarted_worker_is_a_new_member() -> None:
    router = Router("m-0")
    body = body_of(router.dispatched(spec()))
    new = info("m-0", "2")
    said = router(Announced(new))
    assert said == [Disconnect("m-0"), Connect(new)]
    assert router(Announced(new)) == []
    assert router(Gone("m-0", "1")) == [], "an old life's end"
    [sent] = router(Greeted("m-0", reply("m-0", "2")))
    assert body_of([sent]).attempt == body.attempt + 1
    assert router.charges == {"m-0": 3 + 4}


def test_a_wrong_incarnation_or_a_refusal_is_no_member() -> None:
    router = Router()
    router(Announced(info("m-0", "2")))
    router(Greeted("m-0", reply("m-0", "1")))
    assert router.decider.ready() == "no prefill and no decode worker is up"
    [load] = router.decider.loads(0.0).workers
    assert load.state == "refused"


def test_a_silent_worker_is_lost_and_a_report_keeps_it() -> None:
    router = Router("m-0", "m-1", worker_lease_s=5.0)
    counts = dict.fromkeys(LoadReport.__struct_fields__, 0)
    names = {"worker_id": "m-0", "incarnation": "1", "role": "mixed", "kv_transport": ""}
    report = LoadReport(**(counts | names | {"integrity_errors": ()}))
    assert router(FromWorker("m-0", report), 4.0) == []
    assert router(Tick(), 5.1) == [Disconnect("m-1")]
    assert [w.state for w in router.decider.loads(5.1).workers] == ["up", "down"]


def test_time_in_which_the_router_slept_is_no_silence_of_its_workers() -> None:
    router = Router("p-0", "d-0", worker_lease_s=5.0)
    [sent] = router.dispatched(spec())
    router.tokens("p-0", item(body_of([sent]), 0, A))
    assert router(Tick(late_s=29.0), 30.0) == [], "a second of silence, then it slept"
    assert {w.state for w in router.decider.loads(30.0).workers} == {"up"}
    assert router(Tick(), 34.0) == []
    lost = [i for i in router(Tick(), 34.1) if isinstance(i, Disconnect)]
    assert lost == [Disconnect("p-0"), Disconnect("d-0")], "what was left of the lease goes on"


def test_a_worker_heard_since_the_router_woke_has_one_lease_and_no_more() -> None:
    router = Router("m-0", worker_lease_s=5.0)
    router.up("m-0", "2", now=10.0)
    assert router(Tick(late_s=9.0), 10.1) == []
    assert router(Tick(), 15.1) == []
    assert router(Tick(), 15.2) == [Disconnect("m-0")]


def test_a_request_that_waits_for_a_worker_waits_while_the_router_is_awake() -> None:
    router = Router("m-0", worker_lease_s=60.0)
    router.dispatched(spec())
    router(Gone("m-0", "1"), 1.0)
    assert router(Tick(late_s=30.0), 32.0) == []
    [sent] = router.up("m-0", "2", now=33.0)[-1:]
    assert body_of([sent]).attempt == 1


@pytest.mark.parametrize(
    ("ticks", "late"),
    [
        ([5.0], [0.0]),
        ([5.0, 5.1, 5.3], [0.0, 0.0, 0.0]),
        ([5.0, 12.2, 12.3, 13.5], [0.0, 7.0, 0.0, 1.0]),
    ],
)
def test_a_tick_is_late_by_what_is_over_the_time_allowed(
    ticks: list[float], late: list[float]
) -> None:
    watch = TickWatch(0.2)
    assert [watch.late_s(now) for now in ticks] == pytest.approx(late)


def test_what_a_worker_counts_stands_in_its_load_under_the_same_name() -> None:
    router = Router("m-0")
    names = {"worker_id": "m-0", "incarnation": "1", "role": "mixed", "kv_transport": "zeromq"}
    numbers = {name: i for i, name in enumerate(LoadReport.__struct_fields__, start=1)}
    report = LoadReport(**(numbers | names | {"integrity_errors": ("broken",)}))
    router(FromWorker("m-0", report), 1.0)
    [load] = router.decider.loads(1.5).workers
    told = {f.name for f in dataclasses.fields(load)} & set(LoadReport.__struct_fields__)
    assert {name: getattr(load, name) for name in told} == {
        name: getattr(report, name) for name in told
    }
    untold = {"num_waiting_tokens", "block_size", "num_transfers"}
    assert set(LoadReport.__struct_fields__) - told == untold


def test_no_worker_for_long_fails_with_the_reason() -> None:
    router = Router("m-0", worker_lease_s=60.0)
    body = body_of(router.dispatched(spec(), 0.0))
    router(Gone("m-0", "1"), 1.0)
    assert router(Tick(), 1.0 + QUEUE_PATIENCE_S) == []
    [failure] = router(Tick(), 1.1 + QUEUE_PATIENCE_S)
    assert isinstance(failure.error, Unavailable)
    assert "mixed worker m-0 was lost: its process ended" in failure.error.message
    assert body.attempt == 0
    router.idle()


@pytest.mark.parametrize(("num_tokens", "hop"), [(0, "prefill"), (1, "transfer"), (2, "decode")])
def test_the_deadline_names_where_it_passed(num_tokens: int, hop: str) -> None:
    router = Router("p-0", "d-0", worker_lease_s=60.0)
    body = body_of(router.dispatched(spec(timeout_s=5.0)))
    assert body.deadline_in_s == 5.0
    for seq in range(num_tokens):
        router.tokens("d-0" if seq else "p-0", item(body, seq, A))
    assert router(Tick(), 5.0) == []
    said = router(Tick(), 5.1)
    abort = Abort(body.request_id, 0)
    assert said[:2] == [ToWorker("d-0", abort), ToWorker("p-0", abort)]
    assert isinstance(said[2].error, DeadlineExceeded)
    assert said[2].error.hop == hop
    router.idle()


def test_a_client_abort_reaches_every_worker_and_is_idempotent() -> None:
    router = Router("p-0", "d-0")
    bodies = [body_of([i]) for i in router.dispatched(spec(n=2))]
    said = router(ClientAbort("r"))
    assert [i for i in said if isinstance(i, ToWorker)] == [
        ToWorker(worker, Abort(b.request_id, 0)) for b in bodies for worker in ("d-0", "p-0")
    ]
    [failure] = [i for i in said if isinstance(i, Failure)]
    assert isinstance(failure.error, Cancelled)
    assert router(ClientAbort("r")) == []
    assert router(ClientAbort("unknown")) == []
    router.idle()


def test_a_request_id_is_free_again_after_its_end_and_never_meets_its_past() -> None:
    router = Router("m-0")
    old = body_of(router.dispatched(spec(max_tokens=1)))
    with pytest.raises(RequestConflict, match="request id 'r' is running"):
        router.submit(spec())
    router(ClientAbort("r"))
    new = body_of(router.dispatched(spec()))
    assert outputs(router.tokens("m-0", item(old, 0, B, finish_reason="length"))) == []
    assert outputs(router.tokens("m-0", item(new, 0, A)))[0].text == "a"


def test_admission_refuses_at_the_door() -> None:
    with pytest.raises(Unavailable, match="no prefill and no decode worker is up"):
        Router().submit(spec())
    with pytest.raises(Unavailable, match="no decode worker is up"):
        Router("p-0").submit(spec())
    router = Router("p-0", max_queued_requests=2)
    router.up("d-0", fingerprint="other")
    with pytest.raises(Unavailable, match="KV layout"):
        router.submit(spec())
    router.up("d-1")
    with pytest.raises(Overloaded, match=r"router\.max_queued_requests"):
        router.submit(spec(n=3))
    with pytest.raises(PromptTooLong, match="1000 tokens"):
        router.submit(spec(max_tokens=CAPACITY))
    router.dispatched(spec(n=2))
    with pytest.raises(Overloaded):
        router.submit(spec("s"))
    router(ClientAbort("r"))
    router(DrainAll())
    with pytest.raises(Unavailable, match="draining"):
        router.submit(spec())
    router.idle()


def test_draining_lets_what_runs_finish() -> None:
    router = Router("m-0")
    body = body_of(router.dispatched(spec(max_tokens=1)))
    assert router(DrainAll()) == []
    assert outputs(router.tokens("m-0", item(body, 0, A, finish_reason="length")))
    router.idle()


def test_a_transfer_failure_with_nobody_else_uses_the_suspect_again() -> None:
    router = Router("p-0", "d-0", max_attempts=3)
    body = body_of(router.dispatched(spec()))
    said = router(FromWorker("p-0", failed(body, "transfer_failed", True, "d-0")))
    again = body_of([said[-1]])
    said = router(FromWorker("p-0", failed(again, "transfer_failed", True, "d-0")))
    third = body_of([said[-1]])
    said = router(FromWorker("p-0", failed(third, "transfer_failed", True, "d-0")))
    assert isinstance(said[-1].error, TransferFailed)
    router.idle()
