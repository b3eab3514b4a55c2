"""Every message survives the wire; whatever else comes is a WireError and nothing else."""

from __future__ import annotations

import dataclasses
from typing import get_args

import msgpack
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.messaging import codec
from baton.messaging.codec import MAX_MESSAGE_BYTES, decode, encode
from baton.protocol.errors import WireError
from baton.protocol.messages import AnyMessage, Dispatch, Message
from tests.support.core import body
from tests.support.message_strategies import KINDS, messages

FAST = settings(
    deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(data=st.data())
@settings(FAST, max_examples=25)
def test_every_message_round_trips(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    wire = encode(message)
    back = decode(wire)
    assert type(back) is kind
    assert back == message
    assert decode(memoryview(bytearray(wire))) == message


def test_every_message_of_the_module_is_in_the_union() -> None:
    assert set(get_args(AnyMessage)) == set(Message.__subclasses__())
    assert len({kind.__name__ for kind in KINDS}) == len(KINDS)


def decodes_to(data: bytes) -> AnyMessage | None:
    """The message, or None for a WireError; any other exception fails the test."""
    try:
        return decode(data)
    except WireError:
        return None


@given(messages(), st.data())
@settings(FAST, max_examples=100)
def test_a_truncated_message_is_refused(message: Message, data: st.DataObject) -> None:
    wire = encode(message)
    assert decodes_to(wire[: data.draw(st.integers(0, len(wire) - 1))]) is None


@given(messages(), st.binary(min_size=1, max_size=20))
@settings(FAST, max_examples=50)
def test_bytes_behind_a_message_are_refused(message: Message, tail: bytes) -> None:
    assert decodes_to(encode(message) + tail) is None


@given(messages(), st.data())
@settings(FAST, max_examples=200)
def test_a_damaged_message_is_refused_or_still_a_message(
    message: Message, data: st.DataObject
) -> None:
    wire = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(wire) - 1))
        wire[at] ^= 1 << data.draw(st.integers(0, 7))
    got = decodes_to(bytes(wire))
    if got is not None:
        assert type(decode(encode(got))) is type(got)


@given(st.binary(max_size=200))
@settings(FAST, max_examples=200)
def test_garbage_is_refused(garbage: bytes) -> None:
    assert decodes_to(garbage) is None


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=10)
    | st.binary(max_size=10)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**33)),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


@given(st.sampled_from([kind.__name__ for kind in KINDS]), st.lists(PLAIN, max_size=20))
@settings(FAST, max_examples=60)
def test_any_plain_value_under_a_known_tag_is_refused_or_a_message_of_that_tag(
    tag: str, fields: list[object]
) -> None:
    got = decodes_to(msgpack.packb([tag, *fields]))
    assert got is None or type(got).__name__ == tag


@pytest.mark.parametrize(
    "wire",
    [
        b"",
        b"\x91" * 100_000,
        b"\x81" * 5_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc7\x00\xff",
        b"\xc7\x00\x05",
        b"\xd6\xff\x00\x00\x00\x00",
        msgpack.packb(["NoSuchMessage", 1]),
        msgpack.packb([[], 1]),
        msgpack.packb({"Abort": 1}),
        msgpack.packb(["Abort", "r", -1]),
        msgpack.packb(["Abort", "", 1]),
        msgpack.packb(["Abort", "x" * 193, 1]),
        msgpack.packb(["Abort", "r", 1.0]),
        msgpack.packb(["Abort", "r", "1"]),
        msgpack.packb(["Abort", b"r", 1]),
        msgpack.packb(["Abort", b"\xff".decode("latin1"), 2**63]),
        b"\x93\xa5Abort\xa2\xff\xfe\x01",
        msgpack.packb(["TransferEnd", "t", 1, 1, 1, [2**31]]),
    ],
    ids=lambda wire: repr(wire[:20]),
)
def test_known_tricks_are_refused(wire: bytes) -> None:
    assert decodes_to(wire) is None


def test_a_newer_peer_may_append_fields() -> None:
    assert decode(msgpack.packb(["Abort", "r", 1, "from a later version"])) == decode(
        msgpack.packb(["Abort", "r", 1])
    )


def test_nan_is_no_time() -> None:
    wire = msgpack.unpackb(encode(dispatch(1)))
    assert wire[0] == "Dispatch"
    wire[1][-1] = float("nan")
    with pytest.raises(WireError, match=r"deadline_in_s|float"):
        decode(msgpack.packb(wire))


def dispatch(num_tokens: int) -> Message:
    return Dispatch(msgspec.structs.replace(body(), prompt_ids=(7,) * num_tokens), None)


def test_the_longest_prompt_passes_and_one_token_more_does_not() -> None:
    longest = dispatch(1_048_576)
    assert decode(encode(longest)) == longest
    with pytest.raises(WireError, match="1048576"):
        decode(encode(dispatch(1_048_577)))


def test_sizes_are_capped_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WireError, match="the cap is"):
        decode(b"\xc0" * (MAX_MESSAGE_BYTES + 1))
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", 10)
    with pytest.raises(AssertionError, match="Dispatch of"):
        encode(dispatch(10))


def test_structs_are_positional_and_frozen() -> None:
    assert msgpack.unpackb(encode(dispatch(2)))[:1] == ["Dispatch"]
    with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
        dispatch(1).decode = None  # type: ignore[attr-defined]
