"""Lifecycles as tables: ``TRANSITIONS[state][event] -> state``. Terminal states map to ``{}``.

Three of them: a request as its router sees it, a KV hand-over seen from each end, and a
worker's membership. Machines do no I/O and read no clock; an illegal move changes nothing
and raises with the story of the id.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from enum import StrEnum
from typing import Generic, TypeVar

MAX_STORY_MOVES = 64


class RequestState(StrEnum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


class RequestEvent(StrEnum):
    PLACED = "placed"
    FIRST_TOKEN_HANDED_OVER = "first_token_handed_over"
    """The prefill side drew a token and another worker goes on."""
    FIRST_TOKEN_LOCAL = "first_token_local"
    """The same worker goes on: a mixed instance, or a decode worker that runs both phases."""
    DECODE_TOKEN = "decode_token"
    FINISH = "finish"
    FAIL = "fail"
    ABORT = "abort"
    WORKER_LOST = "worker_lost"
    """Back to the queue with attempt + 1 and the tokens emitted so far."""


_R, _E = RequestState, RequestEvent
_REQUEST_ENDS = {_E.FINISH: _R.FINISHED, _E.FAIL: _R.FAILED, _E.ABORT: _R.ABORTED}

REQUEST_TRANSITIONS: Mapping[RequestState, Mapping[RequestEvent, RequestState]] = {
    _R.QUEUED: {_E.PLACED: _R.PREFILLING, _E.FAIL: _R.FAILED, _E.ABORT: _R.ABORTED},
    _R.PREFILLING: {
        _E.FIRST_TOKEN_HANDED_OVER: _R.TRANSFERRING,
        _E.FIRST_TOKEN_LOCAL: _R.DECODING,
        _E.WORKER_LOST: _R.QUEUED,
        **_REQUEST_ENDS,
    },
    _R.TRANSFERRING: {
        _E.DECODE_TOKEN: _R.DECODING,
        _E.WORKER_LOST: _R.QUEUED,
        **_REQUEST_ENDS,
    },
    _R.DECODING: {
        _E.DECODE_TOKEN: _R.DECODING,
        _E.WORKER_LOST: _R.QUEUED,
        **_REQUEST_ENDS,
    },
    _R.FINISHED: {},
    _R.FAILED: {},
    _R.ABORTED: {},
}


class SendState(StrEnum):
    """The prefill end of a hand-over. From the end of prefill on it owns the source blocks."""

    RESERVING = "reserving"
    PARKED = "parked"
    """Prefill is done and the decode side has no room yet: it grants when it has."""
    STREAMING = "streaming"
    FLUSHING = "flushing"
    ACKED = "acked"
    FAILED = "failed"
    ABORTED = "aborted"


class SendEvent(StrEnum):
    GRANTED = "granted"
    PREFILL_DONE = "prefill_done"
    NACKED = "nacked"
    ACK = "ack"
    FAIL = "fail"
    ABORT = "abort"


_S, _V = SendState, SendEvent
_SEND_ENDS = {_V.FAIL: _S.FAILED, _V.ABORT: _S.ABORTED}

SEND_TRANSITIONS: Mapping[SendState, Mapping[SendEvent, SendState]] = {
    _S.RESERVING: {_V.GRANTED: _S.STREAMING, _V.PREFILL_DONE: _S.PARKED, **_SEND_ENDS},
    _S.PARKED: {_V.GRANTED: _S.FLUSHING, **_SEND_ENDS},
    _S.STREAMING: {_V.PREFILL_DONE: _S.FLUSHING, _V.NACKED: _S.STREAMING, **_SEND_ENDS},
    _S.FLUSHING: {_V.ACK: _S.ACKED, _V.NACKED: _S.FLUSHING, **_SEND_ENDS},
    _S.ACKED: {},
    _S.FAILED: {},
    _S.ABORTED: {},
}


class ReceiveState(StrEnum):
    """The decode end. From RESERVED on it owns destination blocks; COMMITTED passes them on.

    Writes run beside it: blocks change hands only once none of a refused epoch runs."""

    WAITING = "waiting"
    RESERVED = "reserved"
    VOID = "void"
    """The epoch is refused; the next begins once no write of it runs."""
    FENCING = "fencing"
    """The transfer is over and its id refused; its blocks are free once no write runs."""
    COMMITTED = "committed"
    REVOKED = "revoked"
    ABORTED = "aborted"


class ReceiveEvent(StrEnum):
    ROOM = "room"
    FRAME = "frame"
    WRITTEN = "written"
    CORRUPT = "corrupt"
    """A frame broke a promise: everything so far is void and a new epoch begins."""
    FENCED = "fenced"
    """No write runs any more."""
    COMPLETE = "complete"
    REVOKE = "revoke"
    ABORT = "abort"


_C, _W = ReceiveState, ReceiveEvent

RECEIVE_TRANSITIONS: Mapping[ReceiveState, Mapping[ReceiveEvent, ReceiveState]] = {
    _C.WAITING: {_W.ROOM: _C.RESERVED, _W.REVOKE: _C.REVOKED, _W.ABORT: _C.ABORTED},
    _C.RESERVED: {
        _W.FRAME: _C.RESERVED,
        _W.WRITTEN: _C.RESERVED,
        _W.CORRUPT: _C.VOID,
        _W.COMPLETE: _C.COMMITTED,
        _W.REVOKE: _C.FENCING,
        _W.ABORT: _C.FENCING,
    },
    _C.VOID: {
        _W.WRITTEN: _C.VOID,
        _W.FENCED: _C.RESERVED,
        _W.REVOKE: _C.FENCING,
        _W.ABORT: _C.FENCING,
    },
    _C.FENCING: {_W.WRITTEN: _C.FENCING, _W.FENCED: _C.REVOKED},
    _C.COMMITTED: {},
    _C.REVOKED: {},
    _C.ABORTED: {},
}


class MemberState(StrEnum):
    """A worker incarnation. A restarted worker is a new member, so DOWN is terminal."""

    JOINING = "joining"
    UP = "up"
    DOWN = "down"
    REFUSED = "refused"


class MemberEvent(StrEnum):
    ACCEPTED = "accepted"
    REFUSED = "refused"
    REPORT = "report"
    LOST = "lost"


_M, _N = MemberState, MemberEvent

MEMBER_TRANSITIONS: Mapping[MemberState, Mapping[MemberEvent, MemberState]] = {
    _M.JOINING: {_N.ACCEPTED: _M.UP, _N.REFUSED: _M.REFUSED, _N.LOST: _M.DOWN},
    _M.UP: {_N.REPORT: _M.UP, _N.LOST: _M.DOWN},
    _M.DOWN: {},
    _M.REFUSED: {},
}

S = TypeVar("S", bound=StrEnum)
E = TypeVar("E", bound=StrEnum)


class IllegalTransition(AssertionError):
    """Our bug: an event that the table does not allow. ``story`` is the id's history."""

    def __init__(self, ident: str, state: StrEnum, event: StrEnum, story: str) -> None:
        super().__init__(f"{ident}: {event.value!r} is illegal in {state.value!r}; {story}")
        self.ident = ident
        self.state = state
        self.event = event
        self.story = story


class Machine(Generic[S, E]):
    """One id's walk through one table."""

    def __init__(self, ident: str, table: Mapping[S, Mapping[E, S]], start: S, now: float) -> None:
        self.ident = ident
        self.state = start
        self.since = now
        self._table = table
        self._story: deque[tuple[float, str, S]] = deque([(now, "start", start)], MAX_STORY_MOVES)

    def allows(self, event: E) -> bool:
        return event in self._table[self.state]

    def move(self, event: E, now: float) -> S:
        """Raises IllegalTransition, and then nothing has changed."""
        target = self._table[self.state].get(event)
        if target is None:
            raise IllegalTransition(self.ident, self.state, event, self.story())
        if target != self.state:
            self.since = now
            self._story.append((now, event.value, target))
        self.state = target
        return target

    @property
    def is_terminal(self) -> bool:
        return not self._table[self.state]

    def story(self) -> str:
        """Moves between states, oldest first, with seconds since the first one kept."""
        first = self._story[0][0]
        moves = (f"+{t - first:.3f}s {event} -> {state.value}" for t, event, state in self._story)
        return "story: " + ", ".join(moves)
