"""Small values for tests of the deciders: configs, layouts, requests, and a fake engine."""

from __future__ import annotations

from collections.abc import Sequence as Many
from typing import Literal

from baton.engine.plan import SampledToken, StepPlan, StepResult
from baton.protocol.config import EngineConfig, KvTransferConfig
from baton.protocol.layout import KvLayout
from baton.protocol.messages import RequestBody, WorkerRef
from baton.protocol.sampling import SamplingParams

VOCAB_SIZE = 1_000
EOS_ID = 999
DECODE = WorkerRef("d-0", "inc-d", "tcp://127.0.0.1:1")
LAYOUT = KvLayout.uniform(
    num_layers=3, num_kv_heads=1, head_dim=4, dtype="float32", model_digest="m"
)
ROW_BYTES = LAYOUT.bytes_per_token_layer


def engine_config(
    num_blocks: int = 16,
    *,
    block_size: int = 8,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 16,
    growth_tokens: int = 8,
    watermark: float = 0.0,
    prefix_cache: bool = True,
    swap_blocks: int = 0,
    prefill_mode: Literal["chunked", "layered"] = "chunked",
    speculation: Literal["off", "prompt_lookup"] = "off",
) -> EngineConfig:
    return EngineConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        growth_tokens=growth_tokens,
        watermark=watermark,
        prefix_cache=prefix_cache,
        swap_blocks=swap_blocks,
        prefill_mode=prefill_mode,
        speculation=speculation,
    )


def transfer_config(
    *, max_frame_bytes: int = 4_096, lease_s: float = 10.0, max_resends: int = 2
) -> KvTransferConfig:
    return KvTransferConfig(
        max_frame_bytes=max_frame_bytes, lease_s=lease_s, max_resends=max_resends
    )


def body(
    request_id: str = "r",
    prompt: int | Many[int] = 4,
    *,
    attempt: int = 0,
    output: Many[int] = (),
    max_tokens: int = 4,
    ignore_eos: bool = False,
    stop_token_ids: tuple[int, ...] = (),
    priority: int = 0,
    router_id: str = "router-0",
    deadline_in_s: float = 600.0,
) -> RequestBody:
    """``prompt``: the ids, or how many."""
    return RequestBody(
        request_id=request_id,
        attempt=attempt,
        router_id=router_id,
        router_epoch=1,
        prompt_ids=tuple(range(prompt)) if isinstance(prompt, int) else tuple(prompt),
        output_ids=tuple(output),
        sampling=SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=ignore_eos,
            stop_token_ids=stop_token_ids,
        ),
        priority=priority,
        deadline_in_s=deadline_in_s,
    )


def drawn_token(seq_id: str, position: int) -> int:
    """What the fake engine draws: a function of request and position alone, never EOS. It mostly
    repeats itself, so that it can be guessed, and not always."""
    name = seq_id.rpartition("/")[0] or seq_id
    return (sum(name.encode()) * 31 + position % 4 * 7 + (position % 11 == 0)) % EOS_ID


def run_plan(plan: StepPlan) -> StepResult:
    """The fake engine: one token for each chunk that samples, one more for each right draft."""
    sampled: list[SampledToken] = []
    for chunk in plan.chunks:
        drafts = chunk.token_ids[len(chunk.token_ids) - chunk.num_drafts :]
        position = chunk.start + len(chunk.token_ids) - chunk.num_drafts
        for draft in (*drafts, -1) if chunk.samples else ():
            token_id = drawn_token(chunk.seq_id, position)
            sampled.append(SampledToken(chunk.seq_id, token_id))
            position += 1
            if token_id != draft:
                break
    return StepResult(plan.step, tuple(sampled), 0.001)
