"""What happens to the router's decider, and what it asks of the shell around it."""

from __future__ import annotations

from dataclasses import dataclass

from baton.protocol.errors import BatonError
from baton.protocol.messages import AnyMessage, HelloReply, Message
from baton.protocol.spec import WorkerInfo
from router.frontend import Output


@dataclass(frozen=True, slots=True)
class Announced:
    """The launcher started a worker."""

    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class Gone:
    """The launcher knows that this incarnation is no more."""

    worker_id: str
    incarnation: str


@dataclass(frozen=True, slots=True)
class Greeted:
    worker_id: str
    reply: HelloReply


@dataclass(frozen=True, slots=True)
class FromWorker:
    worker_id: str
    message: AnyMessage


@dataclass(frozen=True, slots=True)
class ClientAbort:
    """A client asked for it, or went away."""

    request_id: str


@dataclass(frozen=True, slots=True)
class DrainAll:
    """Admit nothing new; what runs may finish."""


@dataclass(frozen=True, slots=True)
class Tick:
    """``late_s``: so long, before this tick, the router did not run and could hear nobody."""

    late_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Connect:
    info: WorkerInfo


@dataclass(frozen=True, slots=True)
class Disconnect:
    worker_id: str


@dataclass(frozen=True, slots=True)
class ToWorker:
    worker_id: str
    message: Message


@dataclass(frozen=True, slots=True)
class Deliver:
    output: Output


@dataclass(frozen=True, slots=True)
class Failure:
    """The whole request is over; all its choices are."""

    request_id: str
    error: BatonError


Event = Announced | Gone | Greeted | FromWorker | ClientAbort | DrainAll | Tick
Instruction = Connect | Disconnect | ToWorker | Deliver | Failure
