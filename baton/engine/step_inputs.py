"""A ``StepPlan`` as index tensors, made once per step and shared by every layer.

Rows are the step's tokens, packed without padding (as in Prepacking and SplitFuse): first the
sequences that run one token (decode), then the longer chunks. Row order is private to the
forward pass; results go back in plan order through ``sample_rows``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.engine.kernels.paged_decode_attention import SPLIT_TOKENS
from baton.engine.kv_cache import slots_of
from baton.engine.plan import SequenceChunk, StepPlan
from baton.engine.sampling.prompt_logprobs import num_scored
from baton.engine.shared_prefixes import prefix_groups
from baton.protocol.errors import InternalError


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """Decodes that begin alike, as ``shared_prefix_decode_attention`` takes them; all int32.

    prefix_lens: ``[num_decodes]``. rows: ``[R]``. starts: ``[groups + 1]``.
    """

    prefix_lens: Tensor
    rows: Tensor
    starts: Tensor


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T rows of S sequences, of which the first ``num_decodes`` have one row each.

    token_ids, positions, slots: ``[T]`` int64. sample_rows: in plan order, the last row of each
    chunk that samples, behind the rows before its drafts. score_rows: in plan order, the rows
    whose logits score prompt tokens.
    block_tables: ``[S, M]`` int32, 0 past a sequence's blocks.
    cu_seqlens_q: ``[S + 1]`` int32, where each sequence's rows begin. cu_seqlens_prefill: the
    same of the longer chunks alone, counted from their first row. context_lens: ``[S]`` int32,
    tokens of a sequence up to its last row. shared: None where no decodes begin alike, or too few.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sample_rows: Tensor
    score_rows: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_prefill: Tensor
    context_lens: Tensor
    num_decodes: int
    shared: SharedPrefixes | None = None


@dataclass(frozen=True, slots=True)
class StepShape:
    """What of the model and its cache the index tensors depend on. shares_prefixes: whether the
    backend reads a common prefix once."""

    vocab_size: int
    num_blocks: int
    block_size: int
    device: torch.device
    shares_prefixes: bool = False


def build_inputs(plan: StepPlan, shape: StepShape) -> StepInputs:
    """Raises InternalError that names the sequence when a chunk cannot be run as it stands."""
    chunks = sorted(plan.chunks, key=lambda c: len(c.token_ids) > 1)
    _check(plan, chunks, shape)
    num_tokens = np.array([len(c.token_ids) for c in chunks])
    ends = np.array([c.start for c in chunks]) + num_tokens
    tables = _tables(chunks, ends, shape)
    bounds = np.concatenate(([0], num_tokens.cumsum()))
    num_decodes = int((num_tokens == 1).sum())
    last_rows = dict(zip((c.seq_id for c in chunks), bounds[1:] - 1, strict=True))

    def tensor(values: npt.ArrayLike, dtype: npt.DTypeLike) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=dtype)).to(shape.device)

    return StepInputs(
        token_ids=tensor([t for c in chunks for t in c.token_ids], np.int64),
        positions=tensor(_positions(chunks, ends, num_decodes), np.int64),
        slots=tensor(_slots(chunks, ends, tables, num_decodes, shape.block_size), np.int64),
        sample_rows=tensor(_sample_rows(plan, last_rows), np.int64),
        score_rows=tensor(_score_rows(plan, last_rows), np.int64),
        block_tables=tensor(tables, np.int32),
        cu_seqlens_q=tensor(bounds, np.int32),
        cu_seqlens_prefill=tensor(bounds[num_decodes:] - num_decodes, np.int32),
        context_lens=tensor(ends, np.int32),
        num_decodes=num_decodes,
        shared=_shared(tables[:num_decodes], ends[:num_decodes], shape),
    )


def _shared(
    tables: npt.NDArray[np.int32], ends: npt.NDArray[np.int64], shape: StepShape
) -> SharedPrefixes | None:
    if not shape.shares_prefixes or not len(ends):
        return None
    groups = prefix_groups(tables, ends, block_size=shape.block_size, unit_tokens=SPLIT_TOKENS)
    if not groups:
        return None
    prefix_lens = np.zeros(len(ends), dtype=np.int32)
    for group in groups:
        prefix_lens[list(group.rows)] = group.num_tokens
    rows = np.array([row for group in groups for row in group.rows], dtype=np.int32)
    starts = np.array([0, *(len(group.rows) for group in groups)], dtype=np.int32).cumsum()
    return SharedPrefixes(
        prefix_lens=torch.from_numpy(prefix_lens).to(shape.device),
        rows=torch.from_numpy(rows).to(shape.device),
        starts=torch.from_numpy(starts.astype(np.int32)).to(shape.device),
    )


def _sample_rows(plan: StepPlan, last_rows: Mapping[str, int]) -> list[int]:
    rows: list[int] = []
    for chunk in plan.chunks:
        if chunk.samples:
            last = last_rows[chunk.seq_id]
            rows += range(last - chunk.num_drafts, last + 1)
    return rows


def _score_rows(plan: StepPlan, last_rows: Mapping[str, int]) -> list[int]:
    rows: list[int] = []
    for chunk in plan.chunks:
        if chunk.num_prompt_logprobs >= 0:
            first = last_rows[chunk.seq_id] - len(chunk.token_ids) + 1
            rows += range(first, first + num_scored(chunk))
    return rows


def _tables(
    chunks: Sequence[SequenceChunk], ends: npt.NDArray[np.int64], shape: StepShape
) -> npt.NDArray[np.int32]:
    num_blocks = -(-ends // shape.block_size)
    tables = np.zeros((len(chunks), num_blocks.max()), dtype=np.int32)
    for row, (chunk, needed) in enumerate(zip(chunks, num_blocks.tolist(), strict=True)):
        tables[row, :needed] = chunk.block_table[:needed]
    outside = ((tables < 0) | (tables >= shape.num_blocks)).any(axis=1)
    if outside.any():
        seq_id = chunks[int(outside.argmax())].seq_id
        raise InternalError(
            f"{seq_id}: block ids must lie in 0 to {shape.num_blocks - 1}", request_id=seq_id
        )
    return tables


def _positions(
    chunks: Sequence[SequenceChunk], ends: npt.NDArray[np.int64], num_decodes: int
) -> npt.NDArray[np.int64]:
    longer = [
        np.arange(c.start, end)
        for c, end in zip(chunks[num_decodes:], ends[num_decodes:], strict=True)
    ]
    return np.concatenate([ends[:num_decodes] - 1, *longer])


def _slots(
    chunks: Sequence[SequenceChunk],
    ends: npt.NDArray[np.int64],
    tables: npt.NDArray[np.int32],
    num_decodes: int,
    block_size: int,
) -> npt.NDArray[np.int64]:
    blocks, offsets = np.divmod(ends[:num_decodes] - 1, block_size)
    decode = tables[np.arange(num_decodes), blocks].astype(np.int64) * block_size + offsets
    longer = [
        slots_of(table.astype(np.int64), c.start, len(c.token_ids), block_size)
        for c, table in zip(chunks[num_decodes:], tables[num_decodes:], strict=True)
    ]
    return np.concatenate([decode, *longer])


def _check(plan: StepPlan, chunks: Sequence[SequenceChunk], shape: StepShape) -> None:
    if not chunks:
        raise InternalError(f"step {plan.step} has no chunks")
    if len({c.seq_id for c in chunks}) != len(chunks):
        raise InternalError(f"step {plan.step} holds a sequence twice")
    for chunk in chunks:
        reason = _why_not(chunk, shape)
        if reason:
            raise InternalError(f"{chunk.seq_id}: {reason}", request_id=chunk.seq_id)


def _why_not(chunk: SequenceChunk, shape: StepShape) -> str:
    num_tokens = len(chunk.token_ids)
    if num_tokens == 0:
        return "a chunk without tokens"
    if not 0 <= chunk.num_drafts < num_tokens:
        return f"{chunk.num_drafts} drafts in a chunk of {num_tokens} tokens"
    if chunk.start < 0 or len(chunk.block_table) * shape.block_size < chunk.start + num_tokens:
        return (
            f"{len(chunk.block_table)} blocks cover fewer than the positions up to "
            f"{chunk.start + num_tokens - 1}"
        )
    # An id beyond the table is a device-side assert on CUDA, which ends the whole process.
    if min(chunk.token_ids) < 0 or max(chunk.token_ids) >= shape.vocab_size:
        return f"token ids must lie in 0 to {shape.vocab_size - 1}"
    return ""
