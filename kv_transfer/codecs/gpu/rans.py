"""rANS on a GPU: one program per stream, one thread or more per lane.

Within a step the lanes that move a word stand in the run of words in order of lanes: a scan over
the step's lanes says where. Streams do not depend on each other, so a frame of many layers fills
a GPU; a lane alone goes at the pace of its loads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_transfer.codecs.gpu.jit import jit, tl
from kv_transfer.codecs.rans import MAX_LANES, RansTables


class DeviceTables:
    """``RansTables`` as tensors; unsigned numbers are kept in signed ones of their width."""

    def __init__(self, tables: RansTables, device: torch.device) -> None:
        self.log_row = tables.log_row
        self.symbol_of = torch.from_numpy(tables.symbol_of.copy()).to(device)
        self.spans = torch.from_numpy(tables.spans.view("<i4").copy()).to(device)
        reciprocals = tables.coding[:, :, 0].copy()
        self.reciprocals = torch.from_numpy(reciprocals.view("<i8")).to(device)


def encode(
    symbols: Tensor, index: Tensor, tables: DeviceTables, num_lanes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(words int16 ``[runs, n]``, their numbers int32 ``[runs]``, states int32 ``[runs, lanes]``).

    symbols: uint8 ``[runs, n]``, all with a frequency. index: uint8 ``[runs, period]``. A stream
    is its words, then its states.
    """
    runs, n = symbols.shape
    words = torch.empty((runs, n), dtype=torch.int16, device=symbols.device)
    counts = torch.empty(runs, dtype=torch.int32, device=symbols.device)
    states = torch.empty((runs, num_lanes), dtype=torch.int32, device=symbols.device)
    _encode_kernel[(runs,)](
        symbols, index, tables.spans, tables.reciprocals, words, counts, states,
        n, index.shape[1], -(-n // num_lanes),
        LOG_ROW=tables.log_row, LANES=num_lanes, num_warps=_num_warps(num_lanes),
    )  # fmt: skip
    return words, counts, states


def decode(
    words: Tensor, offsets: Tensor, counts: Tensor, states: Tensor, index: Tensor,
    tables: DeviceTables, symbols: Tensor,
) -> Tensor:  # fmt: skip
    """Fills ``symbols`` ``[runs, n]``; returns int32 ``[runs]``: 1 where a stream is whole.

    words: int16, all runs' in one. offsets, counts: int64 and int32 ``[runs]``, where a run's
    begin and how many there are. Reads none of other runs.
    """
    runs, n = symbols.shape
    is_whole = torch.empty(runs, dtype=torch.int32, device=symbols.device)
    num_lanes = states.shape[1]
    _decode_kernel[(runs,)](
        words, offsets, counts, states, index, tables.symbol_of, tables.spans, symbols, is_whole,
        n, index.shape[1], -(-n // num_lanes),
        LOG_ROW=tables.log_row, LANES=num_lanes, num_warps=_num_warps(num_lanes),
    )  # fmt: skip
    return is_whole


def _num_warps(num_lanes: int) -> int:
    assert 0 < num_lanes <= MAX_LANES
    return max(1, min(8, num_lanes // 64))


@jit("n", "period", "num_steps")
def _encode_kernel(
    symbols_ptr: tl.tensor,
    index_ptr: tl.tensor,
    spans_ptr: tl.tensor,
    reciprocals_ptr: tl.tensor,
    words_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    states_ptr: tl.tensor,
    n: tl.tensor,
    period: tl.tensor,
    num_steps: tl.tensor,
    LOG_ROW: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    x = tl.full((LANES,), 65536, tl.uint32)
    end = tl.full((), 0, tl.int32)
    for step in range(num_steps):
        i = (num_steps - 1 - step) * LANES + lane
        is_used = i < n
        symbol = tl.load(symbols_ptr + run * n + i, mask=is_used, other=0).to(tl.int32)
        table = tl.load(index_ptr + run * period + i % period, mask=is_used, other=0).to(tl.int32)
        entry = (table << LOG_ROW) + symbol
        span = tl.load(spans_ptr + entry).to(tl.uint32, bitcast=True)
        reciprocal = tl.load(reciprocals_ptr + entry).to(tl.uint64, bitcast=True)
        freq = span & 0xFFFF
        is_full = is_used & ((x >> 20) >= freq)
        moved = is_full.to(tl.int32)
        # Coded from the last lane to the first: those after a lane stand before it.
        total = tl.sum(moved, 0)
        place = end + total - tl.cumsum(moved, 0)
        tl.store(words_ptr + run * n + place, (x & 0xFFFF).to(tl.int16), mask=is_full)
        end += total
        kept = tl.where(is_full, x >> 16, x)
        quotient = ((kept.to(tl.uint64) * reciprocal) >> 44).to(tl.uint32)
        coded = kept + quotient * (4096 - freq) + (span >> 16)
        x = tl.where(is_used, coded, x)
    tl.store(states_ptr + run * LANES + lane, x.to(tl.int32, bitcast=True))
    tl.store(counts_ptr + run, end)


@jit("n", "period", "num_steps")
def _decode_kernel(
    words_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    states_ptr: tl.tensor,
    index_ptr: tl.tensor,
    symbol_of_ptr: tl.tensor,
    spans_ptr: tl.tensor,
    symbols_ptr: tl.tensor,
    is_whole_ptr: tl.tensor,
    n: tl.tensor,
    period: tl.tensor,
    num_steps: tl.tensor,
    LOG_ROW: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    x = tl.load(states_ptr + run * LANES + lane).to(tl.uint32, bitcast=True)
    words = words_ptr + tl.load(offsets_ptr + run)
    left = tl.load(counts_ptr + run)
    for step in range(num_steps):
        i = step * LANES + lane
        is_used = i < n
        table = tl.load(index_ptr + run * period + i % period, mask=is_used, other=0).to(tl.int32)
        slot = x & 4095
        symbol = tl.load(symbol_of_ptr + (table << 12) + slot.to(tl.int32)).to(tl.int32)
        tl.store(symbols_ptr + run * n + i, symbol.to(tl.uint8), mask=is_used)
        span = tl.load(spans_ptr + (table << LOG_ROW) + symbol).to(tl.uint32, bitcast=True)
        rest = (span & 0xFFFF) * (x >> 12) + slot - (span >> 16)
        is_short = is_used & (rest < 65536)
        moved = is_short.to(tl.int32)
        place = left - tl.cumsum(moved, 0)
        # Too few words: places below 0 are not read, and left stays below 0 from here on.
        word = tl.load(words + place, mask=is_short & (place >= 0), other=0)
        filled = (rest << 16) | (word.to(tl.uint16, bitcast=True).to(tl.uint32))
        left -= tl.sum(moved, 0)
        x = tl.where(is_used, tl.where(is_short, filled, rest), x)
    is_whole = (left == 0) & (tl.sum((x != 65536).to(tl.int32), 0) == 0)
    tl.store(is_whole_ptr + run, is_whole.to(tl.int32))
