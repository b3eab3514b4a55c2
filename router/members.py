"""The workers this router knows, each incarnation a member of its own. Pure.

A member is up when it accepted our hello and reports often enough. Reports are the health
signal: they carry the engine's step counter, and a wedged event loop sends none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from baton.protocol.layout import KvLayout
from baton.protocol.lifecycle import MEMBER_TRANSITIONS, Machine, MemberEvent, MemberState
from baton.protocol.messages import HelloReply, LoadReport, WorkerRef
from baton.protocol.spec import WorkerInfo
from router.frontend import WorkerLoad


@dataclass(slots=True)
class Member:
    """charged_tokens: load that this router has placed here and that is not over yet.

    For a prefill worker these are prompt tokens whose first token has not come, for a
    decode or mixed worker all tokens that its KV pool may have to hold.
    """

    info: WorkerInfo
    machine: Machine[MemberState, MemberEvent]
    seen_at: float
    fingerprint: str = ""
    """Of its KV layout, in the form of wire version 1 where it has one: so workers of both
    versions are compared with each other."""
    capacity_tokens: int = 0
    report: LoadReport | None = None
    charged_tokens: int = 0
    placed_last: int = 0
    """Number of the last placement on it, so that a new member has no backlog to catch up."""
    layout: KvLayout | None = None
    """None of one that speaks wire version 1."""

    @property
    def worker_id(self) -> str:
        return self.info.worker_id

    @property
    def role(self) -> str:
        return self.info.role

    @property
    def is_placeable(self) -> bool:
        return self.machine.state is MemberState.UP

    @property
    def ref(self) -> WorkerRef:
        return WorkerRef(self.info.worker_id, self.info.incarnation, self.info.address)


class Members:
    """One member per worker id: the newest incarnation that the launcher announced."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._members: dict[str, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members.values())

    def get(self, worker_id: str) -> Member | None:
        return self._members.get(worker_id)

    def announce(self, info: WorkerInfo, now: float) -> Member | None:
        """A worker to connect to; returns the older incarnation that it replaces, if any."""
        old = self._members.get(info.worker_id)
        if old is not None and old.info.incarnation == info.incarnation:
            return None
        ident = f"{info.worker_id}/{info.incarnation}"
        machine = Machine(ident, MEMBER_TRANSITIONS, MemberState.JOINING, now)
        self._members[info.worker_id] = Member(info, machine, now)
        return old

    def greeted(self, worker_id: str, reply: HelloReply, now: float) -> None:
        member = self._members.get(worker_id)
        if member is None or member.machine.state is not MemberState.JOINING:
            return
        if reply.refusal or reply.incarnation != member.info.incarnation:
            member.machine.move(MemberEvent.REFUSED, now)
            return
        member.machine.move(MemberEvent.ACCEPTED, now)
        member.layout = layout = reply.layout
        member.fingerprint = (
            reply.layout_fingerprint
            if layout is None
            else layout.fingerprint(1 if layout.is_uniform else 2)
        )
        member.capacity_tokens = reply.capacity_tokens
        member.seen_at = now

    def reported(self, report: LoadReport, now: float) -> None:
        member = self._members.get(report.worker_id)
        if (
            member is not None
            and member.info.incarnation == report.incarnation
            and member.machine.allows(MemberEvent.REPORT)
        ):
            member.machine.move(MemberEvent.REPORT, now)
            member.report = report
            member.seen_at = now

    def lose(self, worker_id: str, now: float) -> bool:
        """True when it was not lost before."""
        member = self._members.get(worker_id)
        if member is None or not member.machine.allows(MemberEvent.LOST):
            return False
        member.machine.move(MemberEvent.LOST, now)
        return True

    def renew(self, late_s: float, now: float) -> None:
        """For ``late_s`` nobody listened here: reports of that time are still to be read."""
        for member in self._members.values():
            member.seen_at = min(now, member.seen_at + late_s)

    def silent(self, now: float) -> list[str]:
        """Ids of the members that have not been heard for a whole lease."""
        return [
            member.worker_id
            for member in self._members.values()
            if now - member.seen_at > self._lease_s and member.machine.allows(MemberEvent.LOST)
        ]

    def loads(self, now: float) -> tuple[WorkerLoad, ...]:
        return tuple(_load(member, now) for member in self._members.values())


def _load(member: Member, now: float) -> WorkerLoad:
    report = member.report
    return WorkerLoad(
        worker_id=member.worker_id,
        incarnation=member.info.incarnation,
        role=member.role,
        state=member.machine.state.value,
        address=member.info.address,
        num_running=report.num_running if report else 0,
        num_waiting=report.num_waiting if report else 0,
        num_blocks=report.num_blocks if report else 0,
        num_free_blocks=report.num_free_blocks if report else 0,
        num_parked=report.num_parked if report else 0,
        num_preemptions=report.num_preemptions if report else 0,
        num_backpressured=report.num_backpressured if report else 0,
        kv_bytes_sent=report.kv_bytes_sent if report else 0,
        kv_bytes_received=report.kv_bytes_received if report else 0,
        kv_transport=report.kv_transport if report else "",
        num_leases=report.num_leases if report else 0,
        num_tasks=report.num_tasks if report else 0,
        integrity_errors=report.integrity_errors if report else (),
        step_count=report.step_count if report else 0,
        age_s=now - member.seen_at,
        num_swapped_out=report.num_swapped_out if report else 0,
        num_cache_queried_tokens=report.num_cache_queried_tokens if report else 0,
        num_cache_hit_tokens=report.num_cache_hit_tokens if report else 0,
        num_draft_tokens=report.num_draft_tokens if report else 0,
        num_accepted_draft_tokens=report.num_accepted_draft_tokens if report else 0,
        kv_links=report.kv_links if report else (),
    )
