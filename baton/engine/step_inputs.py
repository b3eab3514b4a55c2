"""A ``StepPlan`` as index tensors, made once per step and shared by every layer.

Rows are the step's tokens, packed without padding: first the sequences that run one token
(decode), by rising context, then the longer chunks. Row order is private to this file and
``attention``; results go back in plan order through ``sample_rows``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.engine.kv_cache import slots_of
from baton.engine.plan import SequenceChunk, StepPlan
from baton.protocol.errors import InternalError

Ints = npt.NDArray[np.int64]

ONE_GROUP_TOKENS = 128
"""Decode contexts up to this length share one group, whatever they waste in padding."""
MAX_MASK_ELEMENTS = 4 * 2**20
"""Longer prefill chunks are cut into tiles of rows, so that masks stay small."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """B sequences of one query row each, padded to a common number of keys L.

    slots: ``[B * L]``, the null slot where padded. mask: ``[B, 1, 1, L]``, 0 or -inf; None
    when nothing is padded.
    """

    first_row: int
    num_rows: int
    slots: Tensor
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillTile:
    """Query rows of one chunk. slots: ``[L]``; None when the keys are these very rows (a prompt
    from position 0), and then attention is plainly causal. mask: ``[num_rows, L]``, 0 or -inf."""

    first_row: int
    num_rows: int
    slots: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionIndex:
    """Who sees what, for all layers of one sliding window."""

    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillTile, ...]


@dataclass(frozen=True, slots=True)
class StepInputs:
    """T rows. token_ids, positions, slots: ``[T]`` int64. sample_rows: in plan order, the last
    row of each chunk that samples. attention: by sliding window."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sample_rows: Tensor
    attention: dict[int | None, AttentionIndex]


@dataclass(frozen=True, slots=True)
class StepShape:
    """What of the model and its cache the index tensors depend on."""

    vocab_size: int
    num_blocks: int
    block_size: int
    windows: tuple[int | None, ...]
    mask_dtype: torch.dtype
    device: torch.device

    @property
    def null_slot(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class _Rows:
    """One chunk and where it went."""

    first_row: int
    start: int
    num_tokens: int
    block_table: Ints

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


def build_inputs(plan: StepPlan, shape: StepShape) -> StepInputs:
    """Raises InternalError that names the sequence when a chunk cannot be run as it stands."""
    ordered = sorted(
        plan.chunks,
        key=lambda c: (0, c.start) if len(c.token_ids) == 1 else (1, 0),
    )
    rows: list[_Rows] = []
    last_rows: dict[str, int] = {}
    token_ids: list[int] = []
    for chunk in ordered:
        rows.append(_placed(chunk, len(token_ids), shape))
        token_ids.extend(chunk.token_ids)
        last_rows[chunk.seq_id] = len(token_ids) - 1
    _check_plan(plan, token_ids, last_rows, shape)

    def tensor(values: npt.ArrayLike) -> Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(shape.device)

    positions = np.concatenate([np.arange(r.start, r.end, dtype=np.int64) for r in rows])
    slots = np.concatenate(
        [slots_of(r.block_table, r.start, r.num_tokens, shape.block_size) for r in rows]
    )
    return StepInputs(
        token_ids=tensor(token_ids),
        positions=tensor(positions),
        slots=tensor(slots),
        sample_rows=tensor([last_rows[c.seq_id] for c in plan.chunks if c.samples]),
        attention={window: _index(rows, window, shape) for window in set(shape.windows)},
    )


def _placed(chunk: SequenceChunk, first_row: int, shape: StepShape) -> _Rows:
    table = np.asarray(chunk.block_table, dtype=np.int64)
    num_tokens = len(chunk.token_ids)
    if num_tokens == 0:
        raise InternalError(f"{chunk.seq_id}: a chunk without tokens", request_id=chunk.seq_id)
    needed = -(-(chunk.start + num_tokens) // shape.block_size)
    if chunk.start < 0 or len(table) < needed:
        raise InternalError(
            f"{chunk.seq_id}: {len(table)} blocks cover fewer than the positions up to "
            f"{chunk.start + num_tokens - 1}",
            request_id=chunk.seq_id,
        )
    used = table[:needed]
    if used.min() < 0 or used.max() >= shape.num_blocks:
        raise InternalError(
            f"{chunk.seq_id}: block ids must lie in 0 to {shape.num_blocks - 1}",
            request_id=chunk.seq_id,
        )
    return _Rows(first_row, chunk.start, num_tokens, used)


def _check_plan(
    plan: StepPlan, token_ids: list[int], last_rows: dict[str, int], shape: StepShape
) -> None:
    if not plan.chunks:
        raise InternalError(f"step {plan.step} has no chunks")
    if len(last_rows) != len(plan.chunks):
        raise InternalError(f"step {plan.step} holds a sequence twice")
    # An id beyond the table is a device-side assert on CUDA, which ends the whole process.
    if min(token_ids) < 0 or max(token_ids) >= shape.vocab_size:
        for chunk in plan.chunks:
            if min(chunk.token_ids) < 0 or max(chunk.token_ids) >= shape.vocab_size:
                raise InternalError(
                    f"{chunk.seq_id}: token ids must lie in 0 to {shape.vocab_size - 1}",
                    request_id=chunk.seq_id,
                )


def _index(rows: Sequence[_Rows], window: int | None, shape: StepShape) -> AttentionIndex:
    decode = [r for r in rows if r.num_tokens == 1]
    return AttentionIndex(
        decode=tuple(_decode_group(group, window, shape) for group in _grouped(decode)),
        prefill=tuple(
            tile for r in rows if r.num_tokens > 1 for tile in _prefill_tiles(r, window, shape)
        ),
    )


def _grouped(decode: Sequence[_Rows]) -> list[list[_Rows]]:
    """Cut rising contexts so that none is padded to more than twice its length."""
    groups: list[list[_Rows]] = []
    limit = 0
    for rows in decode:
        if rows.end > limit:
            groups.append([])
            limit = max(ONE_GROUP_TOKENS, 2 * rows.end)
        groups[-1].append(rows)
    return groups


def _decode_group(group: Sequence[_Rows], window: int | None, shape: StepShape) -> DecodeGroup:
    ends = np.array([r.end for r in group], dtype=np.int64)
    firsts = np.zeros_like(ends) if window is None else np.maximum(0, ends - window)
    num_keys = int((ends - firsts).max())
    tables = np.zeros((len(group), max(len(r.block_table) for r in group)), dtype=np.int64)
    for i, r in enumerate(group):
        tables[i, : len(r.block_table)] = r.block_table
    positions = firsts[:, None] + np.arange(num_keys, dtype=np.int64)
    seen = positions < ends[:, None]
    blocks = np.minimum(positions // shape.block_size, tables.shape[1] - 1)
    slots = np.take_along_axis(tables, blocks, axis=1) * shape.block_size
    slots = np.where(seen, slots + positions % shape.block_size, shape.null_slot)
    return DecodeGroup(
        first_row=group[0].first_row,
        num_rows=len(group),
        slots=torch.from_numpy(slots.ravel()).to(shape.device),
        mask=None if seen.all() else _additive(seen[:, None, None, :], shape),
    )


def _prefill_tiles(r: _Rows, window: int | None, shape: StepShape) -> list[PrefillTile]:
    if r.start == 0 and (window is None or r.num_tokens <= window):
        return [PrefillTile(r.first_row, r.num_tokens, slots=None, mask=None)]
    tile_rows = max(16, MAX_MASK_ELEMENTS // r.end)
    tiles: list[PrefillTile] = []
    for start in range(r.start, r.end, tile_rows):
        end = min(r.end, start + tile_rows)
        first = 0 if window is None else max(0, start - window + 1)
        slots = slots_of(r.block_table, first, end - first, shape.block_size)
        queries = np.arange(start, end)[:, None]
        keys = np.arange(first, end)[None, :]
        seen = keys <= queries
        if window is not None:
            seen &= keys > queries - window
        tiles.append(
            PrefillTile(
                first_row=r.first_row + start - r.start,
                num_rows=end - start,
                slots=torch.from_numpy(slots).to(shape.device),
                mask=_additive(seen, shape),
            )
        )
    return tiles


def _additive(seen: npt.NDArray[np.bool_], shape: StepShape) -> Tensor:
    """0 where seen, -inf elsewhere: kernels would otherwise convert a boolean in every layer."""
    visible = torch.from_numpy(np.ascontiguousarray(seen)).to(shape.device)
    mask = torch.zeros(visible.shape, dtype=shape.mask_dtype, device=shape.device)
    return mask.masked_fill_(~visible, float("-inf"))
