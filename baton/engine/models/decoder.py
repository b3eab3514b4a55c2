"""The forward pass, written once for every family and every device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from baton.checkpoint.spec import ModelSpec
from baton.engine.kv_cache import KvCache
from baton.engine.models.backend import Backend, Product
from baton.engine.models.experts import mix_experts
from baton.engine.models.model import DenseMlp, Layer, Model
from baton.engine.parallel.group import ALONE, Group
from baton.engine.rope import Rotary, Rotation
from baton.engine.step_inputs import StepInputs

OnLayer = Callable[[int], None]

SCORED_ROWS_AT_ONCE = 128
"""So that the logits of a prompt with log-probabilities stay small beside the model."""


class Decoder:
    """A model of one rank on one device. With several ranks, ``spec`` and ``model`` are this
    rank's part of the heads, the MLP and the vocabulary."""

    def __init__(
        self,
        spec: ModelSpec,
        model: Model,
        backend: Backend,
        device: torch.device,
        group: Group = ALONE,
    ) -> None:
        self._spec = spec
        self._model = model
        self._backend = backend
        self._group = group
        self._rotary = Rotary(spec.ropes, spec.head_dim, device)

    @property
    def shares_prefixes(self) -> bool:
        return self._backend.shares_prefixes

    def forward(
        self,
        inputs: StepInputs,
        cache: KvCache,
        score: Callable[[Tensor], None] | None = None,
        on_layer: OnLayer | None = None,
    ) -> Tensor:
        """Logits ``[S, vocab]`` float32 of ``inputs.sample_rows``; K and V of all rows are stored.

        Other rows end before the final norm, but for ``inputs.score_rows``: ``score`` gets
        their logits, a few rows at a time. Rank 0 alone gets logits; the others compute
        their part of the same rows.
        """
        hidden = self.embed(inputs)
        hidden = self.run_layers(hidden, inputs, cache, range(len(self._model.layers)), on_layer)
        return self.logits(hidden, inputs, score)

    def embed(self, inputs: StepInputs) -> Tensor:
        return self._embed(inputs.token_ids)

    def run_layers(
        self,
        hidden: Tensor,
        inputs: StepInputs,
        cache: KvCache,
        layers: range,
        on_layer: OnLayer | None = None,
    ) -> Tensor:
        """``hidden`` ``[T, h]`` behind ``layers``; their K and V are stored, or will be once the
        device has done what it was given. on_layer: told of each layer as its K and V are."""
        turns = self._rotary.rotations(inputs.positions)
        for number in layers:
            layer = self._model.layers[number]
            hidden = self._attention(hidden, layer, number, turns[number], inputs, cache)
            if on_layer is not None:
                on_layer(number)
            hidden = self._mlp(hidden, layer)
        return hidden

    def logits(
        self, hidden: Tensor, inputs: StepInputs, score: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """What ``forward`` gives, of rows behind the last layer."""
        for first in range(0, len(inputs.score_rows), SCORED_ROWS_AT_ONCE):
            rows = inputs.score_rows[first : first + SCORED_ROWS_AT_ONCE]
            logits = self._logits(hidden, rows)
            if score is not None:
                score(logits)
        return self._logits(hidden, inputs.sample_rows)

    def _logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        last = self._norm(hidden.index_select(0, rows), self._model.final_norm)
        logits = self._group.join_logits(self._model.lm_head(last)).float()
        return soft_cap(logits, self._spec.scales.logit_soft_cap)

    def _embed(self, token_ids: Tensor) -> Tensor:
        rows = self._group.embed(token_ids, self._model.embedding)
        scale = self._spec.scales.embedding
        # The factor is rounded to the rows' dtype first, as the models were trained.
        return rows if scale == 1.0 else rows * torch.tensor(scale, dtype=rows.dtype).item()

    def _attention(
        self,
        hidden: Tensor,
        layer: Layer,
        number: int,
        turn: Rotation,
        inputs: StepInputs,
        cache: KvCache,
    ) -> Tensor:
        # Unnamed rows are given back at once: of long prompts they are the memory of a step.
        mixed = self._backend.attention(
            layer.qkv(self._norm(hidden, layer.input_norm)),
            layer.attention,
            turn,
            inputs,
            cache,
            number,
        )
        return self._add(hidden, layer.output, mixed, layer.attention_out_norm)

    def _mlp(self, hidden: Tensor, layer: Layer) -> Tensor:
        if isinstance(layer.mlp, DenseMlp):
            gated = layer.mlp.gate_up(self._norm(hidden, layer.mlp_norm))
            return self._add(hidden, layer.mlp.down, gated, layer.mlp_out_norm)
        part = self._group.reduce(mix_experts(self._norm(hidden, layer.mlp_norm), layer.mlp))
        return self._add_part(hidden, part, layer.mlp_out_norm)

    def _add(self, hidden: Tensor, last: Product, rows: Tensor, norm: Tensor | None) -> Tensor:
        """``hidden`` and what a block gives back; ``last`` is the block's last product."""
        if norm is None and self._group is ALONE:
            return last(rows, hidden)
        return self._add_part(hidden, self._group.reduce(last(rows)), norm)

    def _add_part(self, hidden: Tensor, part: Tensor, norm: Tensor | None) -> Tensor:
        if norm is None:
            return hidden + part
        return self._backend.norm(part, norm, self._spec.rms_norm_eps, hidden)

    def _norm(self, rows: Tensor, weight: Tensor) -> Tensor:
        return self._backend.norm(rows, weight, self._spec.rms_norm_eps)


def soft_cap(values: Tensor, cap: float | None) -> Tensor:
    return values if cap is None else cap * (values / cap).tanh()
