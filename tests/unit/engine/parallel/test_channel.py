"""Messages between ranks: whole and typed, or an error that says who and why."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.parallel import channel as channel_module
from baton.engine.parallel.channel import Channel, pair
from baton.engine.parallel.messages import (
    KvDone,
    KvRange,
    KvRequest,
    PlanForRanks,
    ReadKv,
    Ready,
    Start,
    WriteKv,
    encode_plan,
    plan_of,
)
from baton.engine.plan import BlockSwap, SequenceChunk, StepPlan
from baton.protocol.errors import RankLost, WireError
from baton.protocol.sampling import SamplingParams

WAIT_S = 30.0


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    own, other = pair("rank 7")
    with other:
        yield own, other
    own.close()


def test_requests_and_payloads_arrive_as_they_were_sent(
    ends: tuple[Channel, socket.socket],
) -> None:
    own, other = ends
    there = Channel(other, "rank 0")
    place = KvRange(3, (5, 1), 2, 4, 0, 2)
    payload = memoryview(bytes(range(256)) * 5_000)
    for sent in (ReadKv(place), WriteKv(place, payload)):
        thread = threading.Thread(target=own.send, args=(sent, WAIT_S))
        thread.start()
        assert there.receive(KvRequest, WAIT_S) == sent
        thread.join()
    there.send(KvDone(payload[:10]), WAIT_S)
    assert own.receive(KvDone, WAIT_S).payload == payload[:10]


def test_a_plan_arrives_with_all_that_the_forward_pass_looks_at() -> None:
    fields: dict[str, Any] = {
        "seq_id": "s",
        "token_ids": (4, 5),
        "start": 3,
        "block_table": (9,),
        "samples": True,
        "num_prompt_logprobs": 2,
        "layer_start": 1,
        "num_layers": 2,
    }
    chunk = SequenceChunk(
        sampling=SamplingParams(seed=3),
        prompt_ids=(1,) * 1_000,
        output_ids=[2] * 1_000,
        **fields,
    )
    plan = StepPlan(8, (chunk,), ("gone",), (BlockSwap(1, 2),), (BlockSwap(3, 4),))
    body = encode_plan(plan)
    assert len(body) < 100, "what only sampling looks at stays here"
    arrived = plan_of(msgspec.msgpack.decode(body, type=PlanForRanks))
    carried = SequenceChunk(sampling=arrived.chunks[0].sampling, **fields)
    assert arrived == replace(plan, chunks=(carried,))


def test_an_end_that_is_closed(ends: tuple[Channel, socket.socket]) -> None:
    own, other = ends
    other.close()
    with pytest.raises(RankLost, match="rank 7 has closed its end"):
        own.receive(Start, WAIT_S)
    with pytest.raises(RankLost, match="rank 7 cannot be reached: Broken pipe"):
        own.send(Ready(), WAIT_S)


def test_an_end_that_closes_within_a_message(ends: tuple[Channel, socket.socket]) -> None:
    own, other = ends
    other.sendall((100).to_bytes(4, "little") + b"x" * 99)
    other.close()
    with pytest.raises(RankLost, match="closed"):
        own.receive(Start, WAIT_S)


def test_an_end_that_is_silent_or_takes_nothing(ends: tuple[Channel, socket.socket]) -> None:
    own, _ = ends
    with pytest.raises(RankLost, match=r"rank 7 was silent for 0.05 s"):
        own.receive(Start, 0.05)
    with pytest.raises(RankLost, match=r"rank 7 was silent for 0.05 s"):
        own.send_encoded(bytes(8 * 2**20), 0.05)


def test_lengths_are_capped_before_memory_is_taken(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = ends
    other.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(WireError, match=f"rank 7 announces {2**32 - 1} bytes"):
        own.receive(Start, WAIT_S)
    monkeypatch.setattr(channel_module, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(WireError, match="a message of 11 bytes; at most 10"):
        own.send_encoded(bytes(11), WAIT_S)


@settings(max_examples=60)
@given(body=st.binary(max_size=40))
def test_bytes_that_are_no_message_are_a_wire_error_or_a_message(body: bytes) -> None:
    own, other = pair("rank 7")
    with other:
        other.sendall(len(body).to_bytes(4, "little") + body)
        said = ""
        try:
            got = own.receive(Start, WAIT_S)
        except WireError as exc:
            said = exc.message
        else:
            assert isinstance(got, Start)
        finally:
            own.close()
    assert not said or "rank 7 sent what does not decode" in said
