from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import pytest

from baton.protocol.lifecycle import (
    MAX_STORY_MOVES,
    MEMBER_TRANSITIONS,
    RECEIVE_TRANSITIONS,
    REQUEST_TRANSITIONS,
    SEND_TRANSITIONS,
    IllegalTransition,
    Machine,
    MemberEvent,
    MemberState,
    ReceiveEvent,
    ReceiveState,
    RequestEvent,
    RequestState,
    SendEvent,
    SendState,
)

Table = Mapping[Any, Mapping[Any, Any]]

TABLES = [
    pytest.param(REQUEST_TRANSITIONS, RequestState, RequestEvent, id="request"),
    pytest.param(SEND_TRANSITIONS, SendState, SendEvent, id="send"),
    pytest.param(RECEIVE_TRANSITIONS, ReceiveState, ReceiveEvent, id="receive"),
    pytest.param(MEMBER_TRANSITIONS, MemberState, MemberEvent, id="member"),
]
TERMINAL = {
    RequestState: {"finished", "failed", "aborted"},
    SendState: {"acked", "failed", "aborted"},
    ReceiveState: {"committed", "revoked", "aborted"},
    MemberState: {"down", "refused"},
}


def first_of(states: type[StrEnum]) -> StrEnum:
    """Each enum lists the state that an id starts in first."""
    return next(iter(states))


@pytest.mark.parametrize(("table", "states", "events"), TABLES)
def test_every_state_is_reached_and_can_end(
    table: Table, states: type[StrEnum], events: type[StrEnum]
) -> None:
    assert set(table) == set(states)
    reached, frontier = {first_of(states)}, [first_of(states)]
    while frontier:
        fresh = set(table[frontier.pop()].values()) - reached
        reached |= fresh
        frontier += fresh
    assert reached == set(states)
    terminal = {state for state in states if not table[state]}
    assert terminal == TERMINAL[states]
    for state in states:
        # Where writes run beside the machine, the way out leads over waiting for their end.
        near = {state, *table[state].values()}
        ends = near.union(*(table[s].values() for s in near))
        assert terminal & ends, f"{state} has no way out"
    assert {event for moves in table.values() for event in moves} == set(events)


@pytest.mark.parametrize(("table", "states", "events"), TABLES)
def test_every_pair_moves_as_the_table_says_or_changes_nothing(
    table: Table, states: type[StrEnum], events: type[StrEnum]
) -> None:
    for state in states:
        for event in events:
            machine: Machine[Any, Any] = Machine("id-7", table, state, 1.0)
            assert machine.is_terminal is (not table[state])
            if event in table[state]:
                assert machine.allows(event)
                assert machine.move(event, 2.0) is table[state][event] is machine.state
                continue
            assert not machine.allows(event)
            before = (machine.state, machine.since, machine.story())
            with pytest.raises(IllegalTransition) as caught:
                machine.move(event, 2.0)
            assert (machine.state, machine.since, machine.story()) == before
            assert (caught.value.ident, caught.value.state, caught.value.event) == (
                "id-7",
                state,
                event,
            )
            assert caught.value.story == machine.story()
            for part in ("id-7", event.value, state.value, "story: "):
                assert part in str(caught.value)


def test_an_illegal_move_tells_the_story() -> None:
    machine = Machine("r1", REQUEST_TRANSITIONS, RequestState.QUEUED, 10.0)
    machine.move(RequestEvent.PLACED, 10.5)
    machine.move(RequestEvent.FIRST_TOKEN_HANDED_OVER, 11.0)
    machine.move(RequestEvent.FINISH, 12.25)
    assert machine.since == 12.25
    with pytest.raises(IllegalTransition) as caught:
        machine.move(RequestEvent.ABORT, 13.0)
    assert str(caught.value) == (
        "r1: 'abort' is illegal in 'finished'; story: +0.000s start -> queued, "
        "+0.500s placed -> prefilling, +1.000s first_token_handed_over -> transferring, "
        "+2.250s finish -> finished"
    )


def test_a_story_is_bounded_and_repeats_are_not_told() -> None:
    machine = Machine("r1", REQUEST_TRANSITIONS, RequestState.QUEUED, 0.0)
    machine.move(RequestEvent.PLACED, 0.0)
    machine.move(RequestEvent.FIRST_TOKEN_LOCAL, 1.0)
    for second in range(2, 500):
        machine.move(RequestEvent.DECODE_TOKEN, float(second))
    assert machine.since == 1.0
    assert machine.story().count("->") == 3
    for second in range(500, 700):
        machine.move(RequestEvent.WORKER_LOST, float(second))
        machine.move(RequestEvent.PLACED, float(second))
    assert machine.story().count("->") == MAX_STORY_MOVES
