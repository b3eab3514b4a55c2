"""One choice of one request: its state, its tokens, its text, its times. Pure.

A choice is what travels: the workers know it as a request under ``wire_id``, which no other
choice of any router ever had. A client may use its request id again once it is free, and
what workers still hold or say of the first use must never meet the second.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from baton.protocol.lifecycle import REQUEST_TRANSITIONS, Machine, RequestEvent, RequestState
from baton.protocol.messages import HopTimes, RequestBody, TokenItem
from baton.protocol.sampling import MAX_SEED, TokenLogprobs
from router.detokenizer import Detokenizer
from router.frontend import FinishReason, GenerateSpec, Output, Span, Timeline, Token
from router.placement import Need, Placement

MAX_EARLY_ITEMS = 4_096
RESERVE_GRACE_S = 2.0


@dataclass(slots=True)
class Times:
    arrived_at: float
    placed_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    prefill: HopTimes | None = None
    transfer: HopTimes | None = None
    transfer_end_at: float = 0.0
    preemptions: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""


@dataclass(slots=True)
class Choice:
    spec: GenerateSpec
    index: int
    wire_id: str
    deadline_at: float
    machine: Machine[RequestState, RequestEvent]
    detokenizer: Detokenizer
    times: Times
    attempt: int = 0
    output_ids: list[int] = field(default_factory=list)
    placement: Placement | None = None
    exclude: frozenset[str] = frozenset()
    queued_at: float = 0.0
    made_by: str = ""
    """In deterministic mode the KV layout of the workers that drew the tokens so far: it names
    their arithmetic, and no other may go on."""
    last_error: tuple[str, str, str] = ("", "", "")
    """(code, message, hop) of the failure that sent it back to the queue."""
    _early: dict[int, TokenItem] = field(default_factory=dict)

    @classmethod
    def start(
        cls, spec: GenerateSpec, index: int, wire_id: str, detokenizer: Detokenizer, now: float
    ) -> Choice:
        return cls(
            spec=spec,
            index=index,
            wire_id=wire_id,
            deadline_at=now + spec.timeout_s,
            machine=Machine(wire_id, REQUEST_TRANSITIONS, RequestState.QUEUED, now),
            detokenizer=detokenizer,
            times=Times(arrived_at=now),
            queued_at=now,
        )

    @property
    def next_seq(self) -> int:
        return len(self.output_ids)

    @property
    def is_over(self) -> bool:
        return self.machine.is_terminal

    def holder(self, now: float) -> str | None:
        """The worker that must have this attempt; None while it changes hands.

        The decode side knows of a hand-over from its reservation on, which was asked for
        before the first token; a grace covers one that is late.
        """
        if self.placement is None:
            return None
        state = self.machine.state
        if state is RequestState.PREFILLING:
            return (self.placement.prefill or self.placement.decode).worker_id
        if state is RequestState.TRANSFERRING and now - self.machine.since < RESERVE_GRACE_S:
            return None
        return self.placement.decode.worker_id

    def need(self) -> Need:
        known = len(self.spec.prompt_ids) + len(self.output_ids)
        fingerprint = self.made_by if self.output_ids else ""
        return Need(known, self.spec.sampling.max_tokens - len(self.output_ids), fingerprint)

    def body(self, router_id: str, router_epoch: int, now: float) -> RequestBody:
        sampling = self.spec.sampling
        if self.index:
            seed = (sampling.seed + self.index) % (MAX_SEED + 1)
            sampling = msgspec.structs.replace(sampling, seed=seed)
        return RequestBody(
            request_id=self.wire_id,
            attempt=self.attempt,
            router_id=router_id,
            router_epoch=router_epoch,
            prompt_ids=self.spec.prompt_ids,
            output_ids=tuple(self.output_ids),
            sampling=sampling,
            priority=self.spec.priority,
            deadline_in_s=max(0.0, self.deadline_at - now),
            tenant=self.spec.cache_salt,
            kv_quality=self.spec.kv_quality,
        )

    def release(self) -> None:
        """Give the charged load back; idempotent."""
        if self.placement is not None:
            self.placement.release()
            self.placement = None

    def requeue(self, suspect: str, error: tuple[str, str, str], now: float) -> None:
        self.machine.move(RequestEvent.WORKER_LOST, now)
        self.release()
        self.attempt += 1
        self.exclude |= {suspect} if suspect else frozenset()
        self.last_error = error
        self.queued_at = now
        self._early.clear()

    def in_order(self, item: TokenItem) -> list[TokenItem]:
        """What can be taken in now that ``item`` is here; a later token waits for earlier ones.

        The first token comes from another worker than the second, so they may overtake.
        """
        if item.seq + len(item.token_ids) <= self.next_seq:
            return []
        if len(self._early) < MAX_EARLY_ITEMS or item.seq == self.next_seq:
            self._early[item.seq] = item
        ready: list[TokenItem] = []
        seq = self.next_seq
        while (follower := self._early.pop(seq, None)) is not None:
            ready.append(follower)
            seq += len(follower.token_ids)
        return ready

    def take(self, item: TokenItem, from_prefill: bool, now: float) -> Output:
        """Book the next tokens: state, times, text. The output may finish the choice."""
        first_seq = self.next_seq
        self._advance(from_prefill, now)
        self._note(item.hop, from_prefill, now)
        ends_on_token = item.finish_reason == "stop"
        shown = item.token_ids[:-1] if ends_on_token else item.token_ids
        pushed = self.detokenizer.push(shown)
        taken = len(item.token_ids) if pushed.stop is None else pushed.stop.token_index + 1
        self.output_ids += item.token_ids[:taken]
        text = pushed.text
        finish_reason: FinishReason | None = None
        stop_reason: str | int | None = None
        if pushed.stop is not None:
            finish_reason, stop_reason = "stop", pushed.stop.stop
        elif item.finish_reason:
            finish_reason = "stop" if ends_on_token else "length"
            stop_reason = item.stop_token_id if item.stop_token_id >= 0 else None
            text += self.detokenizer.flush()
        if finish_reason is not None:
            self.machine.move(RequestEvent.FINISH, now)
        texts = [*pushed.texts, *([""] * taken)]
        tokens = tuple(
            Token(token_id, texts[i], _logprobs(item, i))
            for i, token_id in enumerate(item.token_ids[:taken])
        )
        return Output(
            request_id=self.spec.request_id,
            index=self.index,
            seq=first_seq,
            tokens=tokens,
            text=text,
            num_prompt_tokens=len(self.spec.prompt_ids),
            num_output_tokens=len(self.output_ids),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            timeline=self.timeline() if finish_reason is not None else None,
            prompt_tokens=self._prompt_tokens(item) if first_seq == 0 else (),
        )

    def _prompt_tokens(self, item: TokenItem) -> tuple[Token, ...]:
        if self.spec.sampling.num_prompt_logprobs < 0:
            return ()
        found = (None, *item.prompt_logprobs)
        return tuple(Token(i, "", p) for i, p in zip(self.spec.prompt_ids, found, strict=False))

    def _advance(self, from_prefill: bool, now: float) -> None:
        if self.machine.state is RequestState.PREFILLING:
            assert self.placement is not None
            self.placement.first_token_came()
            self.machine.move(
                RequestEvent.FIRST_TOKEN_HANDED_OVER
                if from_prefill
                else RequestEvent.FIRST_TOKEN_LOCAL,
                now,
            )
        else:
            self.machine.move(RequestEvent.DECODE_TOKEN, now)
        if self.times.first_token_at is None:
            self.times.first_token_at = now
        self.times.last_token_at = now

    def _note(self, hop: HopTimes | None, from_prefill: bool, now: float) -> None:
        if hop is None:
            return
        self.times.preemptions += hop.preemptions
        if hop.transfer_frames or hop.recomputed_tokens:
            self.times.transfer = hop
            self.times.transfer_end_at = now - hop.first_step_s
        elif hop.num_chunks and (from_prefill or self.times.prefill is None):
            self.times.prefill = hop

    def timeline(self) -> Timeline:
        """Durations are each worker's own; only offsets between hops are inferred."""
        times = self.times
        assert times.placed_at is not None
        assert times.first_token_at is not None
        assert times.last_token_at is not None
        prefill = times.prefill or HopTimes()
        queued_ms = (times.placed_at - times.arrived_at + prefill.queued_s) * 1e3
        prefill_ms = prefill.prefill_s * 1e3
        ttft_ms = (times.first_token_at - times.arrived_at) * 1e3
        total_ms = (times.last_token_at - times.arrived_at) * 1e3
        spans = [
            Span("queued", 0.0, queued_ms),
            Span(
                "prefill",
                queued_ms,
                prefill_ms,
                {
                    "worker": times.prefill_worker,
                    "prompt_tokens": len(self.spec.prompt_ids),
                    "chunks": prefill.num_chunks,
                },
            ),
            Span("first_token", ttft_ms, 0.0),
        ]
        decode_start_ms = ttft_ms
        if times.transfer is not None:
            transfer = times.transfer
            decode_start_ms = (times.transfer_end_at - times.arrived_at) * 1e3
            start_ms = decode_start_ms - transfer.transfer_s * 1e3
            spans.append(
                Span(
                    "transfer",
                    start_ms,
                    transfer.transfer_s * 1e3,
                    {
                        "bytes": transfer.transfer_bytes,
                        "raw_bytes": transfer.transfer_raw_bytes,
                        "frames": transfer.transfer_frames,
                        "codec": transfer.codec,
                        "transport": transfer.transport,
                        "reserve_wait_ms": round(transfer.reserve_wait_s * 1e3, 3),
                        "exposed_ms": round(transfer.exposed_s * 1e3, 3),
                        "recomputed_tokens": transfer.recomputed_tokens,
                    },
                )
            )
        n = len(self.output_ids)
        if n > 1:
            spans.append(
                Span(
                    "decode",
                    decode_start_ms,
                    max(0.0, total_ms - decode_start_ms),
                    {
                        "worker": times.decode_worker,
                        "tokens": n - 1,
                        "preemptions": times.preemptions,
                        "attempts": self.attempt + 1,
                    },
                )
            )
        tpot_ms = None if n < 2 else (total_ms - ttft_ms) / (n - 1)
        return Timeline(tuple(spans), ttft_ms, tpot_ms)


def _logprobs(item: TokenItem, i: int) -> TokenLogprobs | None:
    return item.logprobs[i] if i < len(item.logprobs) else None
