"""Whatever well-typed message a worker sends, the router answers or ignores it."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.protocol.config import RouterConfig
from baton.protocol.ids import RequestId
from baton.protocol.messages import (
    Dispatch,
    HelloReply,
    Message,
    RequestFailed,
    TokenBatch,
    TokenItem,
)
from baton.protocol.sampling import SamplingParams
from baton.protocol.spec import WorkerInfo
from router.decider import RouterDecider
from router.detokenizer import Detokenizer
from router.events import Announced, Deliver, Failure, FromWorker, Gone, Greeted, Tick, ToWorker
from router.frontend import GenerateSpec
from tests.support.message_strategies import messages
from tests.support.tiny_text import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WORKERS = {"p-0": "prefill", "d-0": "decode", "m-0": "mixed"}
WORKER = st.sampled_from(sorted(WORKERS))
ITEMS = st.builds(
    TokenItem,
    st.just("?"),
    st.integers(0, 2),
    st.integers(0, 6),
    st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    finish_reason=st.sampled_from(["", "", "stop", "length", "whim"]),
    stop_token_id=st.integers(-1, 300),
)
BATCHES = st.builds(
    TokenBatch, WORKER, st.just("1"), st.lists(ITEMS, min_size=1, max_size=3).map(tuple)
)
FAILED = st.builds(
    RequestFailed,
    st.just("?"),
    st.integers(0, 2),
    st.sampled_from(["internal", "transfer_failed", "from_the_future"]),
    st.text(max_size=5),
    st.booleans(),
    st.just("decode"),
    st.sampled_from(["", "d-0", "x"]),
)


def named(message: Message, wire_ids: list[str], pick: int) -> Message:
    """ "?" stands for a request that the router has sent out."""
    wire_id = wire_ids[pick % len(wire_ids)]
    if isinstance(message, RequestFailed):
        return RequestFailed(
            wire_id, *(getattr(message, f) for f in RequestFailed.__struct_fields__[1:])
        )
    if isinstance(message, TokenBatch):
        items = tuple(
            TokenItem(wire_id, *(getattr(i, f) for f in TokenItem.__struct_fields__[1:]))
            if i.request_id == "?"
            else i
            for i in message.items
        )
        return TokenBatch(message.worker_id, message.incarnation, items)
    return message


@given(
    st.lists(
        st.tuples(WORKER, BATCHES, st.integers(0, 9))
        | st.tuples(WORKER, FAILED, st.integers(0, 9))
        | st.tuples(WORKER, messages(), st.integers(0, 9)),
        max_size=30,
    )
)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_the_router_survives_any_message(said: list[tuple[str, Message, int]]) -> None:
    decider = RouterDecider("router-0", 1, RouterConfig(), lambda s: Detokenizer(TOKENIZER, s.stop))
    wire_ids: list[str] = []
    last_seq: dict[tuple[str, int], int] = {}
    ended: dict[str, int] = {}

    def execute(instructions: list[object]) -> None:
        for instruction in instructions:
            match instruction:
                case ToWorker(_, Dispatch(body, _)):
                    wire_ids.append(body.request_id)
                case Deliver(output):
                    key = (output.request_id, output.index)
                    assert output.seq == last_seq.get(key, 0)
                    last_seq[key] = output.seq + len(output.tokens)
                case Failure(request_id):
                    ended[request_id] = ended.get(request_id, 0) + 1

    for worker, role in WORKERS.items():
        info = WorkerInfo(worker_id=worker, incarnation="1", role=role, address="a", pid=1)
        execute(decider.handle(Announced(info), 0.0))
        reply = HelloReply("", 1, worker, "1", role, "fp", "kv", 1_000)
        execute(decider.handle(Greeted(worker, reply), 0.0))
    for number in range(3):
        sampling = SamplingParams(max_tokens=4)
        stop = ("a",) * (number % 2)
        request_id = RequestId(f"r{number}")
        execute(decider.submit(GenerateSpec(request_id, (1, 2), sampling, 2, stop), 0.0))
    for worker, message, pick in said:
        execute(decider.handle(FromWorker(worker, named(message, wire_ids, pick)), 1.0))
    for worker in WORKERS:
        execute(decider.handle(Gone(worker, "1"), 2.0))
    execute(decider.handle(Tick(), 1e6))
    assert decider.num_open == 0
    assert all(count == 1 for count in ended.values())
    assert {m.charged_tokens for m in decider._members} == {0}
