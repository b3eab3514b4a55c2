"""Decode steps replayed as CUDA graphs: one launch instead of some hundreds.

A graph runs on tensors of fixed addresses and shapes. So steps in which every sequence runs one
token are padded to few sizes - rows, and columns of the block table - and copied into the inputs
that a graph of that size was recorded on; steps with shared prefixes have graphs of their own.
Which sizes, and what padding looks like, is decided here without CUDA; ``CudaRecorder`` records.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from baton.engine.shared_prefixes import MIN_ROWS
from baton.engine.step_inputs import SharedPrefixes, StepInputs

log = logging.getLogger(__name__)

MAX_ROWS = 512
"""Larger steps compute for so long that their launches hide behind it."""
FEWEST_COLUMNS = 64
FINEST_STEP = 8


class Recording(Protocol):
    """A computation on fixed inputs. ``output`` is overwritten by every replay."""

    @property
    def output(self) -> Tensor: ...

    def replay(self) -> None: ...


Recorder = Callable[[Callable[[], Tensor]], Recording]
"""Runs a computation once or more and returns how to run it again."""


def padded_rows(num_rows: int) -> int:
    """1, 2, 4, 8, 16, 24, ... 128, 144, ... 256, 288, ...: at most an eighth more from 64 on."""
    floor = 1 << (num_rows.bit_length() - 1)
    step = max(FINEST_STEP, floor // 8)
    if num_rows <= FINEST_STEP:
        return floor if floor == num_rows else 2 * floor
    return -(-num_rows // step) * step


def padded_columns(num_columns: int) -> int:
    """Powers of two from ``FEWEST_COLUMNS``: attention launches programs for all columns."""
    return max(FEWEST_COLUMNS, 1 << (num_columns - 1).bit_length())


def can_replay(inputs: StepInputs) -> bool:
    """Every sequence runs one token, and nobody asks for logits of prompt tokens."""
    num_rows = len(inputs.token_ids)
    return inputs.num_decodes == num_rows <= MAX_ROWS and not len(inputs.score_rows)


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: StepInputs
    recording: Recording


class DecodeGraphs:
    """The graphs of one decoder, recorded when a size first occurs.

    forward: logits ``[rows, vocab]`` of the inputs' ``sample_rows``, stored K and V. It must not
    wait for the device. Used from one thread.
    """

    def __init__(self, forward: Callable[[StepInputs], Tensor], record: Recorder) -> None:
        self._forward = forward
        self._record = record
        self._graphs: dict[tuple[int, int, bool], _Graph] = {}
        self._is_refused = False

    def logits(self, inputs: StepInputs) -> Tensor | None:
        """As ``forward``, an own copy; None for a step that no graph can run."""
        if self._is_refused or not can_replay(inputs):
            return None
        size = (padded_rows(len(inputs.token_ids)), padded_columns(inputs.block_tables.shape[1]))
        key = (*size, inputs.shared is not None)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._recorded(inputs, size)
            if graph is None:
                return None
            self._graphs[key] = graph
        else:
            fill(graph.inputs, inputs)
            graph.recording.replay()
        return graph.recording.output.index_select(0, inputs.sample_rows)

    def _recorded(self, inputs: StepInputs, size: tuple[int, int]) -> _Graph | None:
        own = empty_inputs(inputs, *size)
        fill(own, inputs)
        try:
            recording = self._record(lambda: self._forward(own))
        except RuntimeError as exc:
            log.warning("decode steps run without CUDA graphs: %s", exc)
            self._is_refused = True
            return None
        # What ran while recording may not have run to the end.
        recording.replay()
        return _Graph(own, recording)


def empty_inputs(like: StepInputs, num_rows: int, num_columns: int) -> StepInputs:
    """Fixed inputs of ``num_rows`` sequences of one row each; every row samples, in row order."""
    device = like.token_ids.device
    bounds = torch.arange(num_rows + 1, dtype=like.cu_seqlens_q.dtype, device=device)
    return replace(
        like,
        token_ids=torch.zeros(num_rows, dtype=like.token_ids.dtype, device=device),
        positions=torch.zeros(num_rows, dtype=like.positions.dtype, device=device),
        slots=torch.full((num_rows,), -1, dtype=like.slots.dtype, device=device),
        sample_rows=torch.arange(num_rows, dtype=like.sample_rows.dtype, device=device),
        score_rows=like.score_rows.clone(),
        block_tables=like.block_tables.new_zeros(num_rows, num_columns),
        cu_seqlens_q=bounds,
        cu_seqlens_prefill=bounds[:1].clone(),
        context_lens=like.context_lens.new_zeros(num_rows),
        num_decodes=num_rows,
        shared=None if like.shared is None else _empty_shared(like.shared, num_rows),
    )


def _empty_shared(like: SharedPrefixes, num_rows: int) -> SharedPrefixes:
    """Room for as many groups as so many rows can make."""
    return SharedPrefixes(
        prefix_lens=like.prefix_lens.new_zeros(num_rows),
        rows=like.rows.new_zeros(num_rows),
        starts=like.starts.new_zeros(num_rows // MIN_ROWS + 1),
    )


def fill(own: StepInputs, inputs: StepInputs) -> None:
    """Copy a step's rows into fixed inputs; rows behind them are padding: nothing is stored for
    them (slot -1), they see nothing (context 0), and groups behind the step's are empty."""
    num_rows, num_columns = inputs.block_tables.shape
    own.token_ids[:num_rows].copy_(inputs.token_ids)
    own.positions[:num_rows].copy_(inputs.positions)
    own.slots[:num_rows].copy_(inputs.slots)
    own.block_tables[:num_rows, :num_columns].copy_(inputs.block_tables)
    own.context_lens[:num_rows].copy_(inputs.context_lens)
    if num_rows < len(own.slots):
        own.slots[num_rows:].fill_(-1)
        own.context_lens[num_rows:].zero_()
    if own.shared is not None and inputs.shared is not None:
        _fill_shared(own.shared, inputs.shared)


def _fill_shared(own: SharedPrefixes, shared: SharedPrefixes) -> None:
    own.prefix_lens.zero_()
    own.prefix_lens[: len(shared.prefix_lens)].copy_(shared.prefix_lens)
    own.rows[: len(shared.rows)].copy_(shared.rows)
    own.starts.copy_(shared.starts[-1:].expand(len(own.starts)))
    own.starts[: len(shared.starts)].copy_(shared.starts)


class CudaRecorder:
    """Records on one device; all recordings share one pool of memory, since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Recording:
        """The first run compiles kernels and allocates what libraries keep; neither can be part
        of a graph."""
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Another thread may be moving KV meanwhile: what it does is no part of the graph.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        return _CudaRecording(graph, output)


@dataclass(frozen=True, slots=True)
class _CudaRecording:
    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> None:
        self.graph.replay()
