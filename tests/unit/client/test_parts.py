"""Retries, the joining of chunks, and what a failed call means, without a server."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
import pytest

from baton.client.failures import explain
from baton.client.responses import Collector
from baton.client.retry import MAX_DELAY_S, Retry
from baton.client.types import Chunk, Token, Usage
from baton.protocol import errors


def chunk(seq, num_tokens=1, index=0, finish=None) -> Chunk:
    part = tuple(Token(seq + i, "x") for i in range(num_tokens))
    return Chunk("r", index, seq, part, "x" * num_tokens, Usage(4, seq + num_tokens), finish)


class TestRetry:
    def test_delays_grow_and_stay_bounded(self):
        retry = Retry(20, deadline_s=None)
        delays = [retry.delay_s(errors.Unavailable("x"), 0.0) for _ in range(20)]
        assert all(0.05 * 2**i <= delays[i] <= 0.15 * 2**i for i in range(4))
        assert max(delays) <= MAX_DELAY_S * 1.5
        assert retry.delay_s(errors.Unavailable("x"), 0.0) is None

    def test_no_try_starts_behind_the_deadline(self):
        assert Retry(5, deadline_s=10.0).delay_s(errors.Unavailable("x"), 9.99) is None
        assert Retry(5, deadline_s=10.0).delay_s(errors.Unavailable("x"), 5.0) is not None

    def test_only_what_may_succeed_later(self):
        assert Retry(5, None).delay_s(errors.InvalidRequest("x"), 0.0) is None
        assert Retry(5, None).delay_s(errors.PeerError("x", retryable=False), 0.0) is None

    def test_a_conflict_counts_as_our_own_echo_on_later_tries_alone(self):
        retry = Retry(5, None)
        assert retry.delay_s(errors.RequestConflict("x"), 0.0) is None
        assert retry.delay_s(errors.Unavailable("x"), 0.0) is not None
        assert retry.delay_s(errors.RequestConflict("x"), 0.0) is not None


class TestCollector:
    def test_choices_are_joined_on_their_own(self):
        collector = Collector(2)
        for part in (
            chunk(0, 2),
            chunk(0, 1, index=1),
            chunk(2, 1, finish="stop"),
            chunk(1, 3, index=1, finish="length"),
        ):
            collector.add(part)
        completion = collector.completion()
        assert [c.text for c in completion.choices] == ["xxx", "xxxx"]
        assert completion.usage == Usage(4, 7)

    @pytest.mark.parametrize("seq", [1, 3])
    def test_a_missing_or_repeated_token_is_noticed(self, seq):
        collector = Collector(1)
        collector.add(chunk(0, 2))
        with pytest.raises(errors.WireError, match=f"goes on at token {seq}, expected 2"):
            collector.add(chunk(seq))

    def test_an_end_without_all_finishes_is_noticed(self):
        collector = Collector(2)
        collector.add(chunk(0, finish="stop"))
        with pytest.raises(errors.WireError, match="after 1 of 2 choices"):
            collector.completion()

    def test_a_chunk_with_text_alone_ends_a_choice(self):
        collector = Collector(1)
        collector.add(chunk(0, 2))
        collector.add(chunk(2, 0, finish="stop"))
        assert collector.completion().choices[0].finish_reason == "stop"


@dataclass
class Failed(grpc.RpcError):
    """What a channel raises, made by hand."""

    status: grpc.StatusCode
    text: str = ""
    trailing: tuple = ()

    def code(self):
        return self.status

    def details(self):
        return self.text

    def trailing_metadata(self):
        return self.trailing


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        ("UNAVAILABLE", errors.Unavailable, True),
        ("DEADLINE_EXCEEDED", errors.DeadlineExceeded, False),
        ("CANCELLED", errors.Cancelled, False),
        ("RESOURCE_EXHAUSTED", errors.Overloaded, True),
        ("INVALID_ARGUMENT", errors.InvalidRequest, False),
        ("UNIMPLEMENTED", errors.IncompatiblePeer, False),
        ("INTERNAL", errors.InternalError, False),
        ("UNKNOWN", errors.BatonError, False),
        ("PERMISSION_DENIED", errors.BatonError, False),
    ],
)
def test_a_status_without_a_detail_still_has_a_type(status, kind, retryable):
    error = explain(Failed(grpc.StatusCode[status], "why"), "host:1", "Generate", 5.0)
    assert type(error) is kind
    assert error.retryable is retryable
    assert "host:1" in error.message or "was cancelled" in error.message


def test_a_detail_that_does_not_decode_falls_back_to_the_status():
    failed = Failed(
        grpc.StatusCode.UNAVAILABLE, "x", (("other", "text"), ("baton-error-bin", b"\xff"))
    )
    assert type(explain(failed, "host:1", "Generate", None)) is errors.Unavailable
