"""A ``router.frontend.Frontend`` that streams what a script says: for tests of the servers.

It keeps the contract of the real core: one running request per id, ``timeout_s``, abort,
and an iterator whose early close counts as an abort.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from baton.protocol.errors import Cancelled, DeadlineExceeded, RequestConflict
from baton.protocol.ids import RequestId
from baton.protocol.messages import KvLink
from baton.protocol.sampling import TokenLogprobs, TopLogprob
from router.frontend import (
    FinishReason,
    GenerateSpec,
    Loads,
    ModelInfo,
    Output,
    Span,
    Timeline,
    Token,
    WorkerLoad,
)

MODEL = ModelInfo(
    name="scripted",
    architecture="LlamaForCausalLM",
    max_model_len=256,
    vocab_size=512,
    dtype="float32",
    eos_token_ids=(0,),
    created_unix_s=1_700_000_000,
)


def tokens(*texts: str, first_id: int = 100, top: int = -1) -> tuple[Token, ...]:
    """One token per text, ids rising from ``first_id``; ``top`` >= 0 adds logprobs."""
    return tuple(
        Token(first_id + i, text, None if top < 0 else _logprobs(first_id + i, top))
        for i, text in enumerate(texts)
    )


def _logprobs(token_id: int, top: int) -> TokenLogprobs:
    best = tuple(TopLogprob(token_id + k, -0.5 - k) for k in range(top))
    return TokenLogprobs(-0.5, best)


@dataclass(frozen=True)
class Script:
    """What one request gets.

    choices: tokens of each choice; with fewer than ``n`` the last one serves the others too.
    tokens_per_output: how many tokens travel together.
    error, error_after: raised in place of output number ``error_after`` (0: before any).
    stall_after: that many outputs, then nothing until abort, close or ``timeout_s``.
    """

    choices: Sequence[Sequence[Token]] = field(default_factory=lambda: (tokens("a", "b", "c"),))
    tokens_per_output: int = 1
    finish_reason: FinishReason = "length"
    stop_reason: str | int | None = None
    error: BaseException | None = None
    error_after: int = 0
    stall_after: int | None = None


class ScriptedFrontend:
    """``script`` is one for all requests, or a function of the request.

    Read back: ``specs`` (all that were admitted), ``aborts`` (ids given to ``abort``),
    ``closed`` (ids whose iterator was closed before its end), ``num_outputs`` (delivered to
    the consumer so far). Set: ``not_ready`` (the reason), ``current_loads``.
    """

    def __init__(
        self,
        script: Script | Callable[[GenerateSpec], Script] | None = None,
        *,
        model: ModelInfo = MODEL,
    ) -> None:
        self._script = script if script is not None else Script()
        self._model = model
        self._running: dict[RequestId, asyncio.Event] = {}
        self._changed = asyncio.Event()
        self.specs: list[GenerateSpec] = []
        self.aborts: list[RequestId] = []
        self.closed: list[RequestId] = []
        self.num_outputs = 0
        self.not_ready: str | None = None
        self.current_loads = Loads(num_queued=0, num_running=0, workers=(a_worker_load(),))

    @property
    def model(self) -> ModelInfo:
        return self._model

    @property
    def running(self) -> frozenset[RequestId]:
        return frozenset(self._running)

    async def generate(self, spec: GenerateSpec) -> AsyncGenerator[Output, None]:
        if spec.request_id in self._running:
            raise RequestConflict(
                f"request_id {spec.request_id} is running already",
                hop="router",
                request_id=spec.request_id,
            )
        aborted = self._running[spec.request_id] = asyncio.Event()
        self.specs.append(spec)
        self._notify()
        ended = False
        try:
            async with aclosing(self._play(spec, aborted)) as outputs:
                async for output in outputs:
                    self.num_outputs += 1
                    self._notify()
                    yield output
            ended = True
        except Exception:
            ended = True
            raise
        finally:
            del self._running[spec.request_id]
            if not ended:
                self.closed.append(spec.request_id)
            self._notify()

    def abort(self, request_id: RequestId) -> bool:
        self.aborts.append(request_id)
        aborted = self._running.get(request_id)
        if aborted is None:
            return False
        aborted.set()
        return True

    def loads(self) -> Loads:
        return self.current_loads

    def ready(self) -> str | None:
        return self.not_ready

    async def until(self, condition: Callable[[ScriptedFrontend], bool]) -> None:
        """Return once ``condition(self)`` holds; checked after every change."""
        while not condition(self):
            self._changed.clear()
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()

    async def _play(
        self, spec: GenerateSpec, aborted: asyncio.Event
    ) -> AsyncGenerator[Output, None]:
        script = self._script(spec) if callable(self._script) else self._script
        count = 0
        for output in _outputs(spec, script):
            if script.stall_after == count:
                await _stall(spec, aborted)
            if script.error is not None and script.error_after == count:
                raise script.error
            if aborted.is_set():
                raise _cancelled(spec)
            yield output
            count += 1
        if script.stall_after is not None and script.stall_after >= count:
            await _stall(spec, aborted)
        if script.error is not None and script.error_after >= count:
            raise script.error


async def _stall(spec: GenerateSpec, aborted: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(spec.timeout_s):
            await aborted.wait()
    except TimeoutError as exc:
        raise DeadlineExceeded(
            f"no answer within {spec.timeout_s} s", hop="router", request_id=spec.request_id
        ) from exc
    raise _cancelled(spec)


def _cancelled(spec: GenerateSpec) -> Cancelled:
    return Cancelled("aborted on request", hop="router", request_id=spec.request_id)


def _outputs(spec: GenerateSpec, script: Script) -> list[Output]:
    """Round robin over the choices, as a batch of running sequences would stream."""
    per_choice = [
        _of_choice(spec, script, index, script.choices[min(index, len(script.choices) - 1)])
        for index in range(spec.n)
    ]
    longest = max(len(outputs) for outputs in per_choice)
    return [outputs[i] for i in range(longest) for outputs in per_choice if i < len(outputs)]


def _of_choice(
    spec: GenerateSpec, script: Script, index: int, choice: Sequence[Token]
) -> list[Output]:
    outputs = []
    step = script.tokens_per_output
    for seq in range(0, len(choice), step):
        part = tuple(choice[seq : seq + step])
        last = seq + step >= len(choice)
        outputs.append(
            Output(
                request_id=spec.request_id,
                index=index,
                seq=seq,
                tokens=part,
                text="".join(token.text for token in part),
                num_prompt_tokens=len(spec.prompt_ids),
                num_output_tokens=seq + len(part),
                finish_reason=script.finish_reason if last else None,
                stop_reason=script.stop_reason if last else None,
                timeline=_timeline() if last else None,
                prompt_tokens=_prompt_tokens(spec) if seq == 0 else (),
            )
        )
    return outputs


def _prompt_tokens(spec: GenerateSpec) -> tuple[Token, ...]:
    """As the core gives them: without texts, the first without log-probability."""
    top = spec.sampling.num_prompt_logprobs
    if top < 0:
        return ()
    return tuple(
        Token(token_id, "", _logprobs(token_id, top) if place else None)
        for place, token_id in enumerate(spec.prompt_ids)
    )


def _timeline() -> Timeline:
    spans = (
        Span("queued", 0.0, 1.0, {"worker": "p-0"}),
        Span("prefill", 1.0, 4.0, {"tokens": 3, "hit_share": 0.5}),
    )
    return Timeline(spans, ttft_ms=5.0, tpot_ms=2.0)


def a_worker_load() -> WorkerLoad:
    """A report in which no two numbers are the same, so that a swapped field shows."""
    return WorkerLoad(
        worker_id="d-0",
        incarnation="00ff",
        role="decode",
        state="up",
        address="tcp://127.0.0.1:5000",
        num_running=1,
        num_waiting=2,
        num_blocks=512,
        num_free_blocks=500,
        num_parked=3,
        num_preemptions=4,
        num_backpressured=5,
        kv_bytes_sent=6,
        kv_bytes_received=2**40,
        kv_transport="zeromq",
        num_leases=7,
        num_tasks=8,
        integrity_errors=("free + held != total",),
        step_count=9,
        age_s=0.25,
        num_swapped_out=10,
        num_cache_queried_tokens=1_000,
        num_cache_hit_tokens=750,
        num_draft_tokens=40,
        num_accepted_draft_tokens=33,
        kv_links=(
            KvLink("d-1", "shared_memory", "same host", 6_000),
            KvLink("", "zeromq", "", 2**40),
            KvLink("d-2", "zeromq", "far", 9, "kv1 7, raw 2", 25 * 2**20, 4, 0.5, 0.4, 0.1),
        ),
    )
