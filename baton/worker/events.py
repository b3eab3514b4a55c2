"""What happens to a worker's decider, and what any decider may ask of its shell."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from baton.engine.plan import StepPlan, StepResult
from baton.protocol.constraint import Constraint
from baton.protocol.messages import AnyMessage, KvLink, LoadReport, Message


@dataclass(frozen=True, slots=True)
class FromPeer:
    """A message from a router or a worker that connected to this one."""

    peer_key: str
    sender_id: str
    role: str
    message: AnyMessage


@dataclass(frozen=True, slots=True)
class StepWanted:
    """The engine is idle and something has happened since it last was."""


@dataclass(frozen=True, slots=True)
class StepDone:
    result: StepResult


@dataclass(frozen=True, slots=True)
class LayersDone:
    """While a step runs: K and V of its first layers are there, for chunks of all layers."""

    step: int
    num_layers: int


@dataclass(frozen=True, slots=True)
class StepRaised:
    """``seq_id``: the sequence to blame, where the error names one."""

    message: str
    seq_id: str = ""


@dataclass(frozen=True, slots=True)
class GrammarReady:
    """Sequences with this constraint may be scheduled. ``compiled``: to be held by each of them;
    what nobody holds may be forgotten."""

    constraint: Constraint
    compiled: object = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class GrammarFailed:
    """``code``: of a BatonError."""

    constraint: Constraint
    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passes; a few times a second."""


@dataclass(frozen=True, slots=True)
class RunStep:
    """layer_marks: numbers of leading layers after which LayersDone is wanted."""

    plan: StepPlan
    layer_marks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CompileGrammar:
    """Answered by GrammarReady or GrammarFailed, also where it was compiled before."""

    constraint: Constraint


@dataclass(frozen=True, slots=True)
class ForgetGrammar:
    """Nobody waits for it any more: no answer is needed, and no work on it."""

    constraint: Constraint


@dataclass(frozen=True, slots=True)
class ToRouter:
    """Send to the router of that id, whichever incarnation said hello last."""

    router_id: str
    message: Message


@dataclass(frozen=True, slots=True)
class ShellFacts:
    """What only the shell can count, for the load report."""

    kv_bytes_sent: int
    kv_bytes_received: int
    kv_transport: str
    """Names of what carries KV, joined by "+"."""
    num_tasks: int
    """asyncio tasks of the whole process: they must come back to their idle number."""
    kv_links: tuple[KvLink, ...] = ()


class Decider(Protocol):
    """A worker's brain. Pure: no I/O, no clock, no thread.

    The instructions that ``handle`` returns are executed in order before the next event.
    """

    @property
    def has_step_in_flight(self) -> bool: ...

    @property
    def num_open(self) -> int:
        """Requests and transfers that are not over yet: what a drain waits for."""
        ...

    def handle(self, event: object, now: float) -> list[object]: ...

    def report(self, facts: ShellFacts) -> LoadReport: ...
