"""Runs a ``StepPlan`` on the model: the one door to everything that holds a tensor.

Synchronous, and used from one thread at a time. Which sequence owns which block, and what runs
when, was decided before a plan arrives here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from baton.checkpoint.digest import model_digest
from baton.checkpoint.spec import ModelSpec, load_spec
from baton.engine.kv_cache import Bytes, KvCache
from baton.engine.models.decoder import forward
from baton.engine.models.parameters import Parameters
from baton.engine.plan import SampledToken, SequenceChunk, StepPlan, StepResult
from baton.engine.rope import Rotary
from baton.engine.sampler import Sampler
from baton.engine.sampling.rows import SampleRow
from baton.engine.step_inputs import StepShape, build_inputs
from baton.engine.weights import Progress, load_parameters
from baton.protocol.errors import ConfigError, InternalError
from baton.protocol.layout import DTYPE_BYTES, KvLayout


class Executor:
    """Parameters and KV blocks of one model on one device."""

    def __init__(
        self, spec: ModelSpec, parameters: Parameters, cache: KvCache, device: torch.device
    ) -> None:
        self.spec = spec
        self._parameters = parameters
        self._cache = cache
        self._sampler = Sampler(spec.eos_token_ids)
        self._rotary = Rotary(spec.ropes, spec.head_dim, device)
        self._shape = StepShape(
            vocab_size=spec.vocab_size,
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            windows=spec.sliding_windows,
            mask_dtype=cache.blocks.dtype,
            device=device,
        )

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dtype: str,
        device: str,
        num_blocks: int,
        block_size: int,
        num_threads: int,
        progress: Progress | None = None,
    ) -> Executor:
        """Load the checkpoint in ``folder`` (see ``checkpoint.find.resolve``).

        dtype: of the KV cache and of the arithmetic. On a CPU the products of ``bfloat16``
        and ``float16`` run in float32 on weights widened to it: CPUs without matrix units for
        these types are ten times slower in them. The KV cache keeps the dtype, so that CPU and
        GPU workers have the same layout. Sets the process's compute threads.
        Raises ConfigError or UnsupportedModel for a folder or device that cannot be used.
        """
        target = _device(device)
        spec = load_spec(folder)
        torch.set_num_threads(num_threads)
        cache_dtype = _dtype(dtype)
        compute_dtype = torch.float32 if target.type == "cpu" else cache_dtype
        layout = KvLayout(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=dtype,
            model_digest=model_digest(folder),
        )
        with torch.inference_mode():
            parameters = load_parameters(
                folder, spec, dtype=compute_dtype, device=target, progress=progress
            )
            cache = KvCache(
                layout,
                num_blocks=num_blocks,
                block_size=block_size,
                dtype=cache_dtype,
                device=target,
            )
            return cls(spec, parameters, cache, target)

    @property
    def layout(self) -> KvLayout:
        return self._cache.layout

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """One forward step. Running the same plan again gives the same state and result.

        Raises InternalError for a plan that cannot be run, and when a sequence's logits are not
        finite: the error names it (``request_id``), and the others may be run again without it.
        """
        began = time.perf_counter()
        self._sampler.forget(plan.gone)
        sampling = [c for c in plan.chunks if c.samples]
        logits = self._logits(plan)
        sampled = self._sample(logits, sampling) if sampling else ()
        return StepResult(plan.step, sampled, time.perf_counter() - began)

    @torch.inference_mode()
    def forward_logits(self, plan: StepPlan) -> Tensor:
        """Logits ``[S, vocab]`` float32 of the chunks that sample, in plan order; no draw."""
        return self._logits(plan)

    @torch.inference_mode()
    def read_kv(
        self,
        block_table: Sequence[int],
        start: int,
        num_tokens: int,
        layer_start: int,
        num_layers: int,
    ) -> memoryview:
        """An own copy of some tokens' K and V: ``[layers, 2, tokens, kv_heads, head_dim]``."""
        return self._cache.read(block_table, start, num_tokens, layer_start, num_layers)

    @torch.inference_mode()
    def write_kv(
        self,
        block_table: Sequence[int],
        start: int,
        num_tokens: int,
        layer_start: int,
        num_layers: int,
        payload: Bytes,
    ) -> None:
        """Store what ``read_kv`` gave elsewhere. Raises InternalError on a wrong length."""
        self._cache.write(block_table, start, num_tokens, layer_start, num_layers, payload)

    def _logits(self, plan: StepPlan) -> Tensor:
        inputs = build_inputs(plan, self._shape)
        return forward(self.spec, self._parameters, inputs, self._cache, self._rotary)

    def _sample(self, logits: Tensor, chunks: Sequence[SequenceChunk]) -> tuple[SampledToken, ...]:
        # The largest logit of a row is NaN when any of them is, and infinite on overflow.
        sound = logits.amax(dim=-1).isfinite().tolist()
        bad = [c.seq_id for c, ok in zip(chunks, sound, strict=True) if not ok]
        if bad:
            raise InternalError(f"the logits of {', '.join(bad)} are not finite", request_id=bad[0])
        return self._sampler.sample(
            logits,
            [
                SampleRow(
                    c.seq_id, c.sampling, c.start + len(c.token_ids), c.prompt_ids, c.output_ids
                )
                for c in chunks
            ],
        )


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {name!r}; allowed: {', '.join(DTYPE_BYTES)}", param="dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch sees no CUDA device here; set placement.device to cpu "
            "or install a CUDA build of torch on a machine with a GPU",
            param="placement.device",
        )
    return device
