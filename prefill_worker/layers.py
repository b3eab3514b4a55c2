"""Which rows of a step's chunks are final when, for those that are being handed over. Pure."""

from __future__ import annotations

from baton.engine.plan import SequenceChunk, StepPlan
from kv_transfer.estimates import ComputeEstimate
from kv_transfer.instructions import SendInstruction
from kv_transfer.overlap import layer_marks
from kv_transfer.sender import Sender


class StepRows:
    """compute: learns what KV costs to compute, here as at the other end. is_layer_wise: KV can be
    read layer after layer while a step runs."""

    def __init__(self, sender: Sender, compute: ComputeEstimate, *, is_layer_wise: bool) -> None:
        self._sender = sender
        self._is_layer_wise = is_layer_wise
        self._compute = compute

    def marks(self, plan: StepPlan) -> tuple[int, ...]:
        """Layers behind which the sender wants to be told."""
        if not self._is_layer_wise:
            return ()
        num_tokens = _num_tokens(plan)
        parts = [
            self._sender.parts(c.seq_id, len(c.token_ids), num_tokens, is_last=c.samples)
            for c in plan.chunks
            if c.seq_id in self._sender and not c.num_layers
        ]
        return layer_marks(self._sender.num_layers, max(parts, default=1))

    def begun(self, plan: StepPlan, now: float) -> list[SendInstruction]:
        """What was found in the prefix cache is final already."""
        return [
            instruction
            for c in plan.chunks
            if c.start and c.seq_id in self._sender
            for instruction in self._sender.computed(c.seq_id, c.block_table, c.start, now)
        ]

    def layers_done(self, plan: StepPlan, num_layers: int, now: float) -> list[SendInstruction]:
        """While the step runs."""
        return [
            instruction
            for chunk in plan.chunks
            if chunk.seq_id in self._sender and not chunk.num_layers
            for instruction in self._rows_done(chunk, num_layers, now)
        ]

    def ran(self, plan: StepPlan, seconds: float) -> None:
        self._sender.ran(_num_tokens(plan), seconds)
        if len(plan.chunks) == 1 and not plan.chunks[0].num_layers:
            [chunk] = plan.chunks
            self._compute.computed(chunk.start, chunk.start + len(chunk.token_ids), seconds)

    def chunk_done(self, chunk: SequenceChunk, now: float) -> list[SendInstruction]:
        """Behind the step: all layers, or those of its group where a prompt goes through a group
        of them a step."""
        behind = chunk.layer_start + chunk.num_layers
        num_layers = behind if chunk.num_layers else self._sender.num_layers
        return self._rows_done(chunk, num_layers, now)

    def _rows_done(
        self, chunk: SequenceChunk, num_layers: int, now: float
    ) -> list[SendInstruction]:
        stop = chunk.start + len(chunk.token_ids)
        return self._sender.layers_computed(chunk.seq_id, chunk.block_table, stop, num_layers, now)


def _num_tokens(plan: StepPlan) -> int:
    return sum(len(chunk.token_ids) for chunk in plan.chunks)
