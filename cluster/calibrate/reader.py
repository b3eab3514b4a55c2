"""A checkpoint that reads text and shows its KV: what it is, and how the loss feels of it.

The forward pass is the engine's own (``baton.engine.models.decoder``), so every family that is
served can be calibrated. Only attention is another: over plain tensors, so that gradients flow
back to the KV of the context. Rows of KV are rounded to the cache's dtype before they are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, scaled_dot_product_attention

from baton.checkpoint.digest import model_digest
from baton.checkpoint.rope_fields import RopeSpec
from baton.checkpoint.spec import load_spec
from baton.engine.kv_cache import KvCache
from baton.engine.models.attention_spec import AttentionSpec
from baton.engine.models.decoder import Decoder, soft_cap
from baton.engine.models.model import assemble
from baton.engine.models.torch_backend import TorchBackend
from baton.engine.rope import Rotation, inverse_frequencies
from baton.engine.step_inputs import StepInputs
from baton.engine.weights import load_parameters
from baton.protocol.layout import KvLayout
from cluster.calibrate.fit import Model
from kv_transfer.codecs.contract import Array, array_dtype

CHUNK_TOKENS = 256
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class Context:
    """A text up to a place, and what the model makes of what follows.

    kv: ``[L, 2, T, heads, head_dim]`` as in the cache. following: the continuation's tokens but
    for the last, whose rows gave ``log_probs`` ``[n, vocab]``; targets: ``[n]``, shifted by one.
    """

    kv: Tensor
    following: Tensor
    targets: Tensor
    log_probs: Tensor


class _Attention(TorchBackend):
    """Attention over ``past`` and the rows of the pass; keeps the latter in ``made``."""

    def __init__(self, dtype: torch.dtype) -> None:
        # The plain kernels, on any device: compiled ones have no gradients.
        super().__init__(torch.device("cpu"), deterministic=False)
        self._dtype = dtype
        self.past: list[tuple[Tensor, Tensor]] | None = None
        self.made: list[tuple[Tensor, Tensor]] = []

    def attention(
        self,
        qkv: Tensor,
        spec: AttentionSpec,
        rotation: Rotation,
        inputs: StepInputs,
        cache: KvCache,
        layer: int,
    ) -> Tensor:
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        q, k, v = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        q = self._turned(q, spec, rotation, 0)
        k = self._turned(k, spec, rotation, 1).to(self._dtype).to(qkv.dtype)
        v = v.to(self._dtype).to(qkv.dtype)
        self.made.append((k, v))
        if self.past is not None:
            k = torch.cat([self.past[layer][0], k])
            v = torch.cat([self.past[layer][1], v])
        distance = inputs.positions[:, None] - torch.arange(len(k), device=k.device)
        seen = distance >= 0
        if spec.window is not None:
            seen &= distance < spec.window
        return _attend(q, k, v, seen, spec).flatten(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, spec: AttentionSpec) -> Tensor:
    """``[n, H, D]``. seen: ``[n, T]``."""
    q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    if spec.soft_cap is None:
        mixed = scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=seen, scale=spec.scale, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)
    share = spec.num_heads // spec.num_kv_heads
    scores = q @ k.repeat_interleave(share, 0).transpose(1, 2) * spec.scale
    weights = soft_cap(scores, spec.soft_cap).masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v.repeat_interleave(share, 0)).transpose(0, 1)


class Reader:
    """Raises ConfigError or UnsupportedModel for a folder that cannot be used.

    dtype: of the KV cache that is calibrated for; weights are read as float32.
    """

    def __init__(self, folder: Path, dtype: str, device: torch.device) -> None:
        spec = load_spec(folder)
        self.dtype = dtype
        self.spec = spec
        self._device = device
        self._backend = _Attention(_DTYPES[dtype])
        layout = KvLayout.uniform(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
            model_digest=model_digest(folder, spec.variant),
        )
        # Not in inference mode, whose tensors take no part in gradients.
        with torch.no_grad():
            parameters = load_parameters(folder, spec, dtype=torch.float32, device=device)
            model = assemble(spec, parameters, self._backend)
        self._decoder = Decoder(spec, model, self._backend, device)
        # Nothing is ever stored in it; the pass wants one.
        self._cache = KvCache(
            layout, num_blocks=1, block_size=1, dtype=_DTYPES[dtype], device=device
        )
        self.model = Model(
            layout.model_digest,
            spec.num_kv_heads,
            spec.head_dim,
            _inverse_frequencies(spec.ropes, spec.head_dim),
        )

    @property
    def max_tokens(self) -> int:
        return self.spec.max_position_embeddings

    @torch.no_grad()
    def read(self, tokens: NDArray[np.int64], num_following: int) -> Context:
        """tokens: context, continuation of ``num_following`` and one token more."""
        ids = torch.from_numpy(tokens).to(self._device)
        num_context = len(tokens) - num_following - 1
        past = None
        for begin in range(0, num_context, CHUNK_TOKENS):
            chunk = ids[begin : min(begin + CHUNK_TOKENS, num_context)]
            self._pass(chunk, begin, past, wants_logits=False)
            new = self._backend.made
            past = new if past is None else _joined(past, new)
        assert past is not None
        kv = torch.stack([torch.stack(pair) for pair in past])
        following = ids[num_context:-1]
        log_probs = log_softmax(self._pass(following, num_context, past), -1)
        return Context(kv, following, ids[num_context + 1 :], log_probs)

    @torch.no_grad()
    def log_probs(self, context: Context, kv: Tensor) -> Tensor:
        """What the continuation's rows give after another KV of the context."""
        logits = self._pass(context.following, kv.shape[2], [(k, v) for k, v in kv])
        return log_softmax(logits, -1)

    def gradient(self, context: Context, generator: torch.Generator) -> Tensor:
        """``[L, 2, T, heads, head_dim]``, of the continuation's loss by the context's KV.

        Targets are drawn from the model's own distribution: so the mean outer product of
        gradients is the curvature of the divergence from what the model says, whatever the text.
        """
        targets = torch.multinomial(context.log_probs.exp().cpu(), 1, generator=generator).to(
            self._device
        )
        kv = context.kv.detach().clone().requires_grad_()
        logits = self._pass(context.following, kv.shape[2], [(k, v) for k, v in kv])
        loss = cross_entropy(logits, targets[:, 0], reduction="sum")
        (found,) = torch.autograd.grad(loss, kv)
        return found

    def to_array(self, kv: Tensor) -> Array:
        """As codecs take it."""
        narrow = kv.to(_DTYPES[self.dtype]).cpu().contiguous()
        if self.dtype == "float32":
            return narrow.numpy()
        return narrow.view(torch.int16).numpy().view(array_dtype(self.dtype))

    def from_array(self, kv: Array) -> Tensor:
        if self.dtype == "float32":
            return torch.from_numpy(kv).to(self._device)
        narrow = torch.from_numpy(kv.view(np.int16)).view(_DTYPES[self.dtype])
        return narrow.to(self._device).float()

    def _pass(
        self,
        ids: Tensor,
        start: int,
        past: list[tuple[Tensor, Tensor]] | None,
        wants_logits: bool = True,
    ) -> Tensor:
        """Logits ``[n, vocab]`` of all rows, or none."""
        rows = torch.arange(len(ids) if wants_logits else 0, device=self._device)
        none = rows[:0]
        inputs = StepInputs(
            token_ids=ids,
            positions=torch.arange(start, start + len(ids), device=self._device),
            slots=none,
            sample_rows=rows,
            score_rows=none,
            block_tables=none,
            cu_seqlens_q=none,
            cu_seqlens_prefill=none,
            context_lens=none,
            num_decodes=0,
        )
        self._backend.past, self._backend.made = past, []
        return self._decoder.forward(inputs, self._cache)


def _joined(
    past: list[tuple[Tensor, Tensor]], new: list[tuple[Tensor, Tensor]]
) -> list[tuple[Tensor, Tensor]]:
    pairs = zip(past, new, strict=True)
    return [(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]])) for a, b in pairs]


def _inverse_frequencies(ropes: tuple[RopeSpec, ...], head_dim: int) -> NDArray[np.float32]:
    """``[L, P]``; zeros, so that keys stay as they are, where frequencies depend on positions.

    Layers whose heads are turned in fewer pairs than others' stay as they are, too: a pair is
    (i, i + P), and one P serves a profile.
    """
    device = torch.device("cpu")
    found = [inverse_frequencies(rope, head_dim, device).numpy() for rope in ropes]
    pairs = max(len(f) for f in found)
    rows = np.zeros((len(ropes), pairs), np.float32)
    for row, rope, frequencies in zip(rows, ropes, found, strict=True):
        if rope.kind != "dynamic" and len(frequencies) == pairs:
            row[:] = frequencies
    return rows
