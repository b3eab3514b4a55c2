"""The router's brain: requests, workers, and what to tell whom. Pure.

``submit`` admits or raises; everything else is ``handle(event, now) -> instructions``. A
choice is over exactly once: with its last Output, or with a Failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from baton.protocol.config import RouterConfig
from baton.protocol.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    Overloaded,
    PromptTooLong,
    RequestConflict,
    Unavailable,
    from_code,
)
from baton.protocol.lifecycle import MemberState, RequestEvent, RequestState
from baton.protocol.messages import (
    Abort,
    AnyMessage,
    Dispatch,
    HeldAttempt,
    LoadReport,
    RequestFailed,
    RouterAlive,
    TokenAck,
    TokenAckItem,
    TokenBatch,
    TokenItem,
)
from baton.protocol.spec import WorkerInfo
from router.choice import Choice
from router.detokenizer import Detokenizer
from router.events import (
    Announced,
    ClientAbort,
    Connect,
    Deliver,
    Disconnect,
    DrainAll,
    Event,
    Failure,
    FromWorker,
    Gone,
    Greeted,
    Instruction,
    Tick,
    ToWorker,
)
from router.frontend import GenerateSpec, Loads
from router.kv_fit import goes_unchanged, why_none_fits
from router.members import Members
from router.placement import Placer

ROLES = ("prefill", "decode", "mixed")
QUEUE_PATIENCE_S = 15.0
"""How long a request that lost its worker waits for another before it fails."""


class RouterDecider:
    def __init__(
        self,
        router_id: str,
        router_epoch: int,
        config: RouterConfig,
        make_detokenizer: Callable[[GenerateSpec], Detokenizer],
        *,
        is_deterministic: bool = False,
    ) -> None:
        self._router_id = router_id
        self._router_epoch = router_epoch
        self._config = config
        self._make_detokenizer = make_detokenizer
        self._is_deterministic = is_deterministic
        self._members = Members(config.worker_lease_s)
        self._placer = Placer(config.placement)
        self._requests: dict[str, list[Choice]] = {}
        self._choices: dict[str, Choice] = {}
        self._draining = False
        self._num_choices = 0

    # --- what others may ask ------------------------------------------------------------

    @property
    def num_open(self) -> int:
        return len(self._choices)

    def ready(self) -> str | None:
        """None when a request could be placed now, else the reason."""
        if self._draining:
            return "the router is draining"
        up = [m for m in self._members if m.is_placeable]
        by_role = {role: [m for m in up if m.role == role] for role in ROLES}
        prefills, decodes = by_role["prefill"], by_role["decode"]
        if by_role["mixed"] or any(goes_unchanged(p, d) for p in prefills for d in decodes):
            return None
        missing = [role for role in ("prefill", "decode") if not by_role[role]]
        if missing:
            return f"no {' and no '.join(missing)} worker is up"
        return why_none_fits(prefills, decodes)

    def alive(self, now: float) -> list[Instruction]:
        """To each worker: this router lives, and what it believes the worker to have."""
        held: dict[str, list[HeldAttempt]] = {m.worker_id: [] for m in self._members}
        for choice in self._choices.values():
            holder = choice.holder(now)
            if holder is not None:
                held[holder].append(HeldAttempt(choice.wire_id, choice.attempt))
        return [
            ToWorker(worker_id, RouterAlive(self._router_epoch, tuple(attempts)))
            for worker_id, attempts in held.items()
        ]

    def loads(self, now: float) -> Loads:
        num_running = sum(1 for c in self._choices.values() if c.next_seq > 0)
        return Loads(len(self._choices) - num_running, num_running, self._members.loads(now))

    # --- requests in --------------------------------------------------------------------

    def submit(self, spec: GenerateSpec, now: float) -> list[Instruction]:
        """Admit and place. Raises RequestConflict, Overloaded, Unavailable, PromptTooLong."""
        if spec.request_id in self._requests:
            raise conflict(spec)
        reason = self.ready()
        if reason is not None:
            raise Unavailable(f"{reason}; retry in a moment", hop="router")
        if len(self._choices) + spec.n > self._config.max_queued_requests:
            raise Overloaded(
                f"{len(self._choices)} requests are in the cluster, the limit is "
                f"{self._config.max_queued_requests} (router.max_queued_requests); retry later",
                hop="router",
            )
        choices = [
            Choice.start(spec, index, self._wire_id(spec), self._make_detokenizer(spec), now)
            for index in range(spec.n)
        ]
        largest = self._placer.never_fits(choices[0].need(), self._members)
        if largest is not None:
            raise PromptTooLong(
                f"{len(spec.prompt_ids)} prompt tokens and max_tokens "
                f"{spec.sampling.max_tokens} need more KV than the largest decode worker's "
                f"{largest} tokens; lower max_tokens or raise engine.num_blocks",
                hop="router",
            )
        self._requests[spec.request_id] = choices
        self._choices |= {choice.wire_id: choice for choice in choices}
        return [i for choice in choices for i in self._place(choice, now)]

    def handle(self, event: Event, now: float) -> list[Instruction]:
        match event:
            case FromWorker(worker_id, message):
                return self._from_worker(worker_id, message, now)
            case ClientAbort(request_id):
                error = Cancelled("the request was aborted", hop="client")
                return self._end_request(request_id, RequestEvent.ABORT, error, now)
            case Announced(info):
                return self._announced(info, now)
            case Greeted(worker_id, reply):
                self._members.greeted(worker_id, reply, now)
                return self._place_queued(now)
            case Gone(worker_id, incarnation):
                member = self._members.get(worker_id)
                if member is None or member.info.incarnation != incarnation:
                    return []
                return self._lost(worker_id, "its process ended", now)
            case DrainAll():
                self._draining = True
                return []
            case Tick(late_s):
                return self._tick(late_s, now)

    def _wire_id(self, spec: GenerateSpec) -> str:
        self._num_choices += 1
        return f"{spec.request_id}#{self._router_epoch:x}.{self._num_choices}"

    # --- placement ----------------------------------------------------------------------

    def _place(self, choice: Choice, now: float) -> list[Instruction]:
        placement = self._placer.place(choice.need(), self._members, choice.exclude)
        if placement is None:
            return []
        choice.placement = placement
        if self._is_deterministic:
            choice.made_by = placement.decode.fingerprint
        choice.machine.move(RequestEvent.PLACED, now)
        times = choice.times
        if times.placed_at is None:
            times.placed_at = now
        first = placement.prefill or placement.decode
        times.prefill_worker = first.worker_id
        times.decode_worker = placement.decode.worker_id
        decode = placement.decode.ref if placement.prefill else None
        body = choice.body(self._router_id, self._router_epoch, now)
        return [ToWorker(first.worker_id, Dispatch(body, decode))]

    def _place_queued(self, now: float) -> list[Instruction]:
        return [
            instruction
            for choice in list(self._choices.values())
            if choice.machine.state is RequestState.QUEUED
            for instruction in self._place(choice, now)
        ]

    # --- workers ------------------------------------------------------------------------

    def _announced(self, info: WorkerInfo, now: float) -> list[Instruction]:
        known = self._members.get(info.worker_id)
        if known is not None and known.info.incarnation == info.incarnation:
            return []
        lost = self._lost(info.worker_id, "it was restarted", now) if known else []
        self._members.announce(info, now)
        return [*lost, Connect(info)]

    def _lost(self, worker_id: str, reason: str, now: float) -> list[Instruction]:
        """Everything that this worker held is placed again, from the tokens that are here."""
        if not self._members.lose(worker_id, now):
            return []
        member = self._members.get(worker_id)
        assert member is not None
        instructions: list[Instruction] = [Disconnect(worker_id)]
        for choice in list(self._choices.values()):
            if choice.placement is None or not choice.placement.involves(worker_id):
                continue
            if (
                choice.machine.state is RequestState.DECODING
                and choice.placement.decode.worker_id != worker_id
            ):
                continue
            error = ("unavailable", f"{member.role} worker {worker_id} was lost: {reason}")
            instructions += self._retry(choice, worker_id, (*error, member.role), now)
        return instructions

    def _from_worker(self, worker_id: str, message: AnyMessage, now: float) -> list[Instruction]:
        match message:
            case TokenBatch(_, incarnation, items):
                member = self._members.get(worker_id)
                if member is None or member.info.incarnation != incarnation:
                    return []
                return self._tokens(worker_id, member.role == "prefill", items, now)
            case RequestFailed():
                return self._failed(message, now)
            case LoadReport():
                self._members.reported(message, now)
        return []

    # --- tokens -------------------------------------------------------------------------

    def _tokens(
        self, worker_id: str, from_prefill: bool, items: tuple[TokenItem, ...], now: float
    ) -> list[Instruction]:
        instructions: list[Instruction] = []
        acks: list[TokenAckItem] = []
        for item in items:
            choice = self._choices.get(item.request_id)
            if choice is None or choice.attempt != item.attempt or choice.placement is None:
                # Nobody waits for these any more: let the worker forget them and stop.
                end = item.seq + len(item.token_ids)
                acks.append(TokenAckItem(item.request_id, item.attempt, end))
                if not item.finish_reason:
                    abort = Abort(item.request_id, item.attempt)
                    instructions.append(ToWorker(worker_id, abort))
                continue
            for ready in choice.in_order(item):
                # The first token of an attempt is its prefill's, whoever tells the rest.
                is_first = choice.machine.state is RequestState.PREFILLING
                handed_over = is_first and choice.placement.prefill is not None
                output = choice.take(ready, handed_over, now)
                instructions.append(Deliver(output))
                if output.finish_reason is not None:
                    told_by_worker = bool(ready.finish_reason)
                    instructions += self._finished(choice, told_by_worker)
                    break
            acks.append(TokenAckItem(item.request_id, item.attempt, choice.next_seq))
        return [ToWorker(worker_id, TokenAck(tuple(acks))), *instructions]

    def _finished(self, choice: Choice, told_by_worker: bool) -> list[Instruction]:
        """A stop string was found here: the workers do not know yet that it is over."""
        aborts = [] if told_by_worker else self._abort_at_workers(choice)
        self._forget(choice)
        return aborts

    def _failed(self, failed: RequestFailed, now: float) -> list[Instruction]:
        choice = self._choices.get(failed.request_id)
        if choice is None or choice.attempt != failed.attempt or choice.placement is None:
            return []
        if failed.retryable:
            error = (failed.code, failed.message, failed.hop)
            return self._retry(choice, failed.suspect, error, now)
        error_out = from_code(
            failed.code,
            failed.message,
            hop=failed.hop,
            retryable=False,
            request_id=choice.spec.request_id,
        )
        return self._end_request(choice.spec.request_id, RequestEvent.FAIL, error_out, now)

    def _retry(
        self, choice: Choice, suspect: str, error: tuple[str, str, str], now: float
    ) -> list[Instruction]:
        aborts = self._abort_at_workers(choice)
        code, message, hop = error
        if choice.attempt + 1 >= self._config.max_attempts:
            failure = from_code(
                code,
                f"{message} (attempt {choice.attempt + 1} of {self._config.max_attempts})",
                hop=hop,
                retryable=True,
                request_id=choice.spec.request_id,
            )
            return self._end_request(choice.spec.request_id, RequestEvent.FAIL, failure, now)
        choice.requeue(suspect, error, now)
        return [*aborts, *self._place(choice, now)]

    # --- ends ---------------------------------------------------------------------------

    def _end_request(
        self, request_id: str, event: RequestEvent, error: BatonError, now: float
    ) -> list[Instruction]:
        choices = self._requests.get(request_id)
        if choices is None:
            return []
        instructions: list[Instruction] = []
        for choice in choices:
            if not choice.is_over:
                instructions += self._abort_at_workers(choice)
                choice.machine.move(event, now)
                self._forget(choice)
        return [*instructions, Failure(request_id, error)]

    def _abort_at_workers(self, choice: Choice) -> list[Instruction]:
        placement = choice.placement
        if placement is None:
            return []
        abort = Abort(choice.wire_id, choice.attempt)
        workers = [placement.decode, *([placement.prefill] if placement.prefill else [])]
        return [
            ToWorker(w.worker_id, abort) for w in workers if w.machine.state is not MemberState.DOWN
        ]

    def _forget(self, choice: Choice) -> None:
        choice.release()
        del self._choices[choice.wire_id]
        request_id = choice.spec.request_id
        if all(c.is_over for c in self._requests[request_id]):
            del self._requests[request_id]

    def _tick(self, late_s: float, now: float) -> list[Instruction]:
        instructions: list[Instruction] = []
        if late_s:
            self._members.renew(late_s, now)
            for choice in self._choices.values():
                choice.queued_at = min(now, choice.queued_at + late_s)
        for worker_id in self._members.silent(now):
            instructions += self._lost(worker_id, "it sent no report", now)
        for choice in self._late(now):
            if choice.is_over:
                continue
            error: BatonError
            if now > choice.deadline_at:
                error = DeadlineExceeded(
                    f"the deadline of {choice.spec.timeout_s} s passed while the request was "
                    f"{choice.machine.state.value}",
                    hop=_hop_of(choice),
                )
            else:
                code, message, hop = choice.last_error
                message = message or "no worker could take the request"
                error = from_code(code or "unavailable", f"{message}; none is left", hop=hop)
            instructions += self._end_request(choice.spec.request_id, RequestEvent.FAIL, error, now)
        return [*instructions, *self._place_queued(now)]

    def _late(self, now: float) -> Iterator[Choice]:
        for choice in list(self._choices.values()):
            queued = choice.machine.state is RequestState.QUEUED
            if now > choice.deadline_at or (queued and now - choice.queued_at > QUEUE_PATIENCE_S):
                yield choice


def conflict(spec: GenerateSpec) -> RequestConflict:
    return RequestConflict(
        f"request id {spec.request_id!r} is running; wait for it, abort it, or choose another id",
        hop="router",
        param="request_id",
    )


def _hop_of(choice: Choice) -> str:
    return {
        RequestState.QUEUED: "router",
        RequestState.PREFILLING: "prefill",
        RequestState.TRANSFERRING: "transfer",
    }.get(choice.machine.state, "decode")
