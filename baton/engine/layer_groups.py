"""Prompts that go through a group of layers a step: their hidden states wait here between steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from baton.engine.kv_cache import KvCache
from baton.engine.models.decoder import Decoder
from baton.engine.plan import SequenceChunk, StepPlan
from baton.engine.step_inputs import StepInputs
from baton.protocol.errors import InternalError

Chunks = tuple[SequenceChunk, ...]


def split_chunks(plan: StepPlan) -> tuple[Chunks, Chunks]:
    """Those for all layers, and those for a group of them; raises InternalError when the latter
    are not the last ones of the plan and all of one group."""
    whole = tuple(c for c in plan.chunks if c.num_layers == 0)
    grouped = plan.chunks[len(whole) :]
    if len({(c.layer_start, c.num_layers) for c in grouped}) > 1 or any(
        c.num_layers == 0 for c in grouped
    ):
        raise InternalError(f"step {plan.step}: the chunks of its layer group stand apart")
    if not plan.chunks and not plan.swap_out:
        raise InternalError(f"step {plan.step} has no chunks")
    return whole, grouped


class LayerGroups:
    """One batch of prompts is on its way: what a step does not run on has left it."""

    def __init__(self, decoder: Decoder, cache: KvCache, num_layers: int) -> None:
        self._decoder = decoder
        self._cache = cache
        self._num_layers = num_layers
        self._kept: dict[str, Tensor] = {}
        self._behind = 0
        """Layers that are done for what is kept."""

    def forward(
        self, chunks: Chunks, inputs: StepInputs, score: Callable[[Tensor], None] | None
    ) -> Tensor:
        """Logits as ``Decoder.forward``, behind the last layer; no rows before."""
        layers = range(chunks[0].layer_start, chunks[0].layer_start + chunks[0].num_layers)
        hidden = self._decoder.run_layers(
            self._hidden(chunks, inputs, layers.start), inputs, self._cache, layers
        )
        self._kept, self._behind = {}, layers.stop
        if layers.stop == self._num_layers:
            return self._decoder.logits(hidden, inputs, score)
        # Chunks have more than one token, so their rows are in the order of the plan.
        parts = torch.split(hidden, [len(c.token_ids) for c in chunks])
        self._kept = {c.seq_id: part.clone() for c, part in zip(chunks, parts, strict=True)}
        return hidden.new_empty((0, 0))

    def _hidden(self, chunks: Chunks, inputs: StepInputs, layer_start: int) -> Tensor:
        short = [c.seq_id for c in chunks if len(c.token_ids) < 2]
        if short:
            raise InternalError(f"{short[0]}: a layer group of one token", request_id=short[0])
        if layer_start == 0:
            return self._decoder.embed(inputs)
        for chunk in chunks:
            rows = self._kept.get(chunk.seq_id)
            if rows is None or len(rows) != len(chunk.token_ids) or self._behind != layer_start:
                raise InternalError(
                    f"{chunk.seq_id}: layer {layer_start} is to go on with what is not here",
                    request_id=chunk.seq_id,
                )
        return torch.cat([self._kept[c.seq_id] for c in chunks])
