"""Every request ends exactly once, whatever workers, messages and clients do."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.router_world import ROLES, World, text_of, token_at
from tests.support.tiny_text import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
NUM_EVENTS = 120
MAX_EVENTS_TO_END = 5_000


def _anything(world: World) -> None:
    rng = world.rng
    match rng.randrange(15):
        case 0 | 1:
            stop = (text_of(token_at(rng.randrange(50), rng.randrange(9))),)
            world.submit(rng.choice([1, 1, 3]), rng.randrange(1, 9), stop * rng.randrange(2))
        case 2 | 3 | 4 | 5:
            world.compute()
        case 6 | 7 | 8 | 9:
            world.deliver()
        case 10:
            world.fail_one()
        case 11:
            world.kill(rng.choice(list(ROLES)))
        case 12:
            world.abort() if rng.random() < 0.3 else world.resend()
        case 13:
            world.tick()
        case 14:
            world.is_cut = not world.is_cut


def _end(world: World) -> None:
    """No more faults: everything that is still open must come to its end."""
    world.is_cut = False
    for count in range(MAX_EVENTS_TO_END):
        if all(client.is_over for client in world.clients.values()):
            return
        if count % 50 == 0:
            world.resend()
            world.tick()
        world.compute()
        world.deliver()
    open_ones = [c.spec.request_id for c in world.clients.values() if not c.is_over]
    raise AssertionError(f"never ended: {open_ones}")


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_every_request_ends_exactly_once(seed: int) -> None:
    world = World(Random(seed), TOKENIZER)
    for _ in range(NUM_EVENTS):
        _anything(world)
    _end(world)
    while world.mail:
        world.deliver()
    world.resend()
    while world.mail:
        world.deliver()

    for client in (*world.clients.values(), *world.over):
        for index, outputs in client.outputs.items():
            tokens = [t for output in outputs for t in output.tokens]
            base = client.spec.sampling.seed + index
            assert [t.token_id for t in tokens] == [token_at(base, i) for i in range(len(tokens))]
            assert [o.seq for o in outputs] == [
                sum(len(o.tokens) for o in outputs[:i]) for i in range(len(outputs))
            ]
            text = "".join(text_of(t.token_id) for t in tokens)
            shown = "".join(o.text for o in outputs)
            last = outputs[-1]
            if last.finish_reason == "stop":
                assert shown == text[: text.index(client.spec.stop[0])]
            elif last.finish_reason == "length":
                assert shown == text
                assert len(tokens) == client.spec.sampling.max_tokens
    assert world.work == {}, "no worker holds an attempt that nobody wants"
    assert world.decider.num_open == 0
    assert {m.worker_id: m.charged_tokens for m in world.decider._members} == dict.fromkeys(
        ROLES, 0
    )
