from __future__ import annotations

from msgspec.structs import replace

from baton.messaging.codec import encode
from baton.protocol.messages import HopTimes, TokenAck, TokenAckItem, TokenBatch, TokenItem
from baton.protocol.sampling import MAX_PROMPT_LOGPROB_ENTRIES, TokenLogprobs, TopLogprob
from baton.worker.events import ToRouter
from baton.worker.outbox import TokenOutbox
from baton.worker.router_leases import ROUTER_LEASE_S, RouterLeases


def item(seq: int, request_id: str = "r", attempt: int = 0) -> TokenItem:
    return TokenItem(request_id, attempt, seq, (seq + 100,))


def batch(*items: TokenItem, router_id: str = "router-0") -> ToRouter:
    return ToRouter(router_id, TokenBatch("w", "inc", items))


def ack(next_seq: int, request_id: str = "r", attempt: int = 0) -> TokenAck:
    return TokenAck((TokenAckItem(request_id, attempt, next_seq),))


def test_one_batch_a_step_and_router() -> None:
    outbox = TokenOutbox("w", "inc")
    outbox.put("router-0", item(0, "a"), 0.0)
    outbox.put("router-1", item(0, "b"), 0.0)
    outbox.put("router-0", item(0, "c"), 0.0)
    assert outbox.flush() == [
        batch(item(0, "a"), item(0, "c")),
        batch(item(0, "b"), router_id="router-1"),
    ]
    assert outbox.flush() == []
    assert outbox.num_streams == 3


def test_what_is_not_acknowledged_is_sent_again() -> None:
    outbox = TokenOutbox("w", "inc")
    for seq in range(3):
        outbox.put("router-0", item(seq), 0.0)
    outbox.flush()
    outbox.ack(ack(1), 0.5)
    assert outbox.resend(1.5) == [], "an acknowledgement came a second ago"
    assert outbox.resend(1.75) == [batch(item(1), item(2))]
    assert outbox.resend(2.0) == []
    outbox.ack(ack(1), 2.0)
    assert outbox.resend(3.0) == [batch(item(1), item(2))]
    outbox.ack(ack(3), 3.0)
    assert (outbox.num_streams, outbox.resend(9.0)) == (0, [])
    outbox.ack(ack(3), 9.0)


def test_a_stream_that_goes_on_does_not_put_off_its_lost_token() -> None:
    """New tokens come every 62.5 ms, and the router waits for number 0."""
    outbox = TokenOutbox("w", "inc")
    resent_at = []
    for step in range(50):
        now = step * 0.0625
        outbox.put("router-0", item(step), now)
        outbox.flush()
        outbox.ack(ack(0), now)
        if outbox.resend(now):
            resent_at.append(now)
    assert resent_at == [1.0625, 2.125]


def test_forget_drops_this_attempt_and_older_ones() -> None:
    outbox = TokenOutbox("w", "inc")
    for attempt in (0, 1, 2):
        outbox.put("router-0", item(0, attempt=attempt), 0.0)
    outbox.put("router-0", item(0, "other"), 0.0)
    outbox.flush()
    outbox.forget("r", 1)
    [again] = outbox.resend(2.0)
    assert again == batch(item(0, attempt=2), item(0, "other"))
    outbox.forget("r", 2**62)
    outbox.forget_router("router-0")
    assert outbox.num_streams == 0


def test_large_batches_are_cut_below_the_message_cap() -> None:
    best = tuple(TopLogprob(2**31 - 1, -1.5) for _ in range(20))
    token = TokenItem("r" * 128, 0, 0, (2**31 - 1,), (TokenLogprobs(-1.5, best),), hop=HopTimes())
    prompt = (TokenLogprobs(-1.5, best),) * (MAX_PROMPT_LOGPROB_ENTRIES // 21)
    for items in ([token] * 20_000, [replace(token, prompt_logprobs=prompt)] * 20):
        outbox = TokenOutbox("w" * 192, "i" * 192)
        for number, one in enumerate(items):
            outbox.put("router-0", replace(one, seq=number), 0.0)
        for batches in (outbox.flush(), outbox.resend(2.0)):
            assert len(batches) > 1
            assert [i.seq for b in batches for i in b.message.items] == list(range(len(items)))
            assert max(len(encode(b.message)) for b in batches) < 16 * 2**20


def test_a_silent_router_expires_once() -> None:
    leases = RouterLeases()
    leases.seen("a", 0.0)
    leases.seen("b", 5.0)
    assert leases.expired(ROUTER_LEASE_S) == []
    assert leases.expired(ROUTER_LEASE_S + 0.1) == ["a"]
    assert leases.expired(ROUTER_LEASE_S + 0.2) == []
    leases.seen("b", 12.0)
    assert leases.expired(21.0) == []
    assert leases.expired(22.1) == ["b"]
