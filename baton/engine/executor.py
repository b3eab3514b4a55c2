"""Runs a ``StepPlan`` on the model: the one door to everything that holds a tensor.

Synchronous, and used from one thread at a time. Which sequence owns which block, and what runs
when, was decided before a plan arrives here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from baton.checkpoint.digest import model_digest
from baton.checkpoint.spec import ModelSpec, load_spec
from baton.engine.cuda_graphs import CudaRecorder, DecodeGraphs
from baton.engine.kv_cache import Bytes, KvCache
from baton.engine.layer_groups import LayerGroups, split_chunks
from baton.engine.layer_marks import CopyStream, LayerMarks
from baton.engine.models.backends import backend_for
from baton.engine.models.decoder import Decoder, OnLayer
from baton.engine.models.model import assemble
from baton.engine.parallel.group import ALONE, Group
from baton.engine.parallel.kv import join_heads, split_heads
from baton.engine.parallel.messages import LoadSettings, ReadKv, WriteKv
from baton.engine.parallel.ranks import STEP_DEADLINE_S, Ranks
from baton.engine.parallel.shard import allowed_sizes, part_of, refusals
from baton.engine.plan import FailedSequence, SampledToken, SequenceChunk, StepPlan, StepResult
from baton.engine.preemption import EngineRates
from baton.engine.sampler import Sampler
from baton.engine.sampling.drafts import kept_draws, rows_of
from baton.engine.sampling.finite import NOT_FINITE, zero_bad_rows
from baton.engine.sampling.kernel_draw import draw_for
from baton.engine.sampling.prompt_logprobs import PromptScorer
from baton.engine.step_inputs import StepInputs, StepShape, build_inputs
from baton.engine.structured.grammar import Vocabulary
from baton.engine.structured.masks import GrammarMasks
from baton.engine.structured.store import GrammarStore
from baton.engine.swap_space import SwapSpace
from baton.engine.warm_up import warm_up, warm_up_tasks
from baton.engine.weights import Progress, load_parameters
from baton.protocol.errors import ConfigError, InternalError, RankLost
from baton.protocol.layout import DTYPE_BYTES, KvLayout


class Executor:
    """Parameters and KV blocks of one model on one device, or one rank's part of them.

    Rank 0 of several has the others as ``ranks`` and speaks for all: KV goes in and out as that
    of the whole model. ``close`` ends them.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layout: KvLayout,
        decoder: Decoder,
        cache: KvCache,
        device: torch.device,
        ranks: Ranks | None,
        grammars: GrammarStore,
        graphs: DecodeGraphs | None,
        swap_space: SwapSpace | None = None,
    ) -> None:
        self.spec = spec
        self.grammars = grammars
        self._masks = GrammarMasks(grammars)
        self.layout = layout
        self._ranks = ranks
        self._device = device
        self._copies = CopyStream(device)
        self._decoder = decoder
        self._graphs = graphs
        self._cache = cache
        self._swap_space = swap_space
        self._layer_groups = LayerGroups(decoder, cache, spec.num_layers)
        self.block_bytes = cache.layout.bytes_per_token * cache.block_size
        """Of one KV block on this rank, all layers."""
        self.swap_rates = EngineRates() if swap_space is None else swap_space.measure()
        self._sampler = Sampler(spec.eos_token_ids, draw_for(device))
        self._shape = StepShape(
            vocab_size=spec.vocab_size,
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            device=device,
            shares_prefixes=decoder.shares_prefixes,
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
        max_model_len: int | None = None,
        swap_blocks: int = 0,
        deterministic: bool = False,
        tensor_parallel: int = 1,
        rank_deadline_s: float = STEP_DEADLINE_S,
        progress: Progress | None = None,
    ) -> Executor:
        """Load the checkpoint in ``folder`` (see ``checkpoint.find.resolve``).

        dtype: of the KV cache, the weights and, on a GPU, the arithmetic; a CPU computes in
        float32 on what it reads in that dtype. Sets the process's compute threads.
        max_model_len: the longest sequence, for models that turn long ones another way.
        swap_blocks: KV blocks of host memory, for plans that swap.
        deterministic: a request's logits are bitwise the same whatever shares its batch and
        however it is cut into chunks (see ``models.backends``).
        tensor_parallel: processes over which the model is split, this one and children of the
        calling thread; the KV blocks, the threads and the device's memory are each one's own.
        rank_deadline_s: the longest that one waits for another before all end.
        Raises ConfigError or UnsupportedModel for a folder or device that cannot be used, and
        RankLost.
        """
        settings = LoadSettings(
            folder=str(folder),
            dtype=dtype,
            device=device,
            num_blocks=num_blocks,
            block_size=block_size,
            num_threads=num_threads,
            max_model_len=max_model_len,
            deterministic=deterministic,
            swap_blocks=swap_blocks,
            num_ranks=tensor_parallel,
        )
        if tensor_parallel == 1:
            return cls.load_part(settings, ALONE, progress=progress)
        spec, own_device = cls.prepare(settings)
        ranks = Ranks.start(settings, spec.vocab_size, own_device, rank_deadline_s)
        try:
            executor = cls.load_part(settings, ranks.group, ranks, progress)
            ranks.await_ready()
        except BaseException:
            ranks.close()
            raise
        return executor

    @staticmethod
    def prepare(settings: LoadSettings) -> tuple[ModelSpec, torch.device]:
        """The whole model's spec and this rank's device. Raises as ``load`` does, before anything
        is allocated."""
        device = _device(settings)
        _dtype(settings.dtype)
        spec = load_spec(Path(settings.folder), settings.max_model_len)
        refused = refusals(spec, settings.num_ranks)
        if refused:
            raise ConfigError(
                f"tensor_parallel is {settings.num_ranks}; {refused[0]}; allowed for this "
                f"checkpoint: {', '.join(map(str, allowed_sizes(spec)))}",
                param="tensor_parallel",
            )
        return spec, device

    @classmethod
    def load_part(
        cls,
        settings: LoadSettings,
        group: Group,
        ranks: Ranks | None = None,
        progress: Progress | None = None,
    ) -> Executor:
        """One rank's part, in this process; the ranks have met as ``group``."""
        spec, device = cls.prepare(settings)
        part = part_of(spec, settings.shard)
        folder = Path(settings.folder)
        cache_dtype = _dtype(settings.dtype)
        backend = backend_for(
            device, num_threads=settings.num_threads, deterministic=settings.deterministic
        )
        layout = KvLayout.uniform(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=settings.dtype,
            model_digest=model_digest(folder, spec.variant),
            arithmetic=f"{backend.arithmetic}/tp-{settings.num_ranks}"
            if settings.deterministic
            else "",
            windows=spec.sliding_windows,
        )
        with torch.inference_mode():
            parameters = load_parameters(
                folder,
                spec,
                dtype=backend.storage_dtype(cache_dtype),
                device=device,
                progress=progress,
                shard=settings.shard,
            )
            cache = KvCache(
                layout.of_rank(settings.num_ranks),
                num_blocks=settings.num_blocks,
                block_size=settings.block_size,
                dtype=cache_dtype,
                device=device,
            )
            model = assemble(part, parameters, backend)
            decoder = Decoder(part, model, backend, device, group)
            grammars = GrammarStore(
                Vocabulary(folder / "tokenizer.json", spec.vocab_size, spec.eos_token_ids)
            )
            graphs = None
            if device.type == "cuda" and group is ALONE:
                graphs = DecodeGraphs(lambda i: decoder.forward(i, cache), CudaRecorder(device))
            swap_space = SwapSpace(cache, settings.swap_blocks) if settings.swap_blocks else None
            executor = cls(
                spec, layout, decoder, cache, device, ranks, grammars, graphs, swap_space
            )
            if device.type == "cuda":
                alone = Decoder(part, model, backend, device)
                draw = draw_for(device)
                warm_up(warm_up_tasks(spec, alone, draw, cache, executor._shape))
            return executor

    @property
    def rank_fds(self) -> tuple[int, ...]:
        """One becomes readable when a rank has gone; then ``rank_loss`` tells of it."""
        return () if self._ranks is None else self._ranks.fds

    def rank_loss(self) -> RankLost:
        assert self._ranks is not None
        return self._ranks.loss()

    def close(self) -> None:
        """End the other ranks, if there are any. Idempotent; nothing runs afterwards."""
        if self._ranks is not None:
            self._ranks.close()

    @torch.inference_mode()
    def execute(
        self,
        plan: StepPlan,
        layer_marks: Collection[int] = (),
        on_layers: Callable[[int], None] | None = None,
    ) -> StepResult:
        """One forward step. Running the same plan again gives the same state and result.

        layer_marks: numbers of layers (``step_layers``); on_layers is called with each once the
        K and V of so many leading layers can be read, for chunks that run through all layers.
        From this thread or another, before this returns; not for a step that is replayed.

        A sequence whose logits are not finite fails alone. Raises InternalError for a plan that
        cannot be run; where one sequence is to blame, the error names it (``request_id``).
        """
        began = time.perf_counter()
        self._sampler.forget(plan.gone)
        self._masks.forget(plan.gone)
        sampling = [c for c in plan.chunks if c.samples]
        scorer = PromptScorer(plan.chunks)
        marks = LayerMarks(layer_marks, on_layers, self._device)
        logits, (out_seconds, in_seconds) = self._run(plan, scorer.add, marks.on_layer)
        self._copies.step_given()
        marks.flush()
        prompt_logprobs, failed = scorer.parts()
        sampled, undrawn = self._sample(logits, sampling) if sampling else ((), ())
        unscored = {f.seq_id for f in failed}
        failed += tuple(f for f in undrawn if f.seq_id not in unscored)
        seconds = time.perf_counter() - began - out_seconds - in_seconds
        return StepResult(
            plan.step, sampled, seconds, prompt_logprobs, out_seconds, in_seconds, failed
        )

    @torch.inference_mode()
    def forward_logits(self, plan: StepPlan) -> Tensor:
        """Logits ``[S, vocab]`` float32 of the chunks that sample, in plan order; no draw."""
        return self._run(plan)[0]

    @torch.inference_mode()
    def read_kv(
        self,
        block_table: Sequence[int],
        start: int,
        num_tokens: int,
        layer_start: int,
        num_layers: int,
        out: memoryview | None = None,
    ) -> memoryview:
        """A copy of some tokens' K and V: ``[layers, 2, tokens, kv_heads, head_dim]``.

        In ``out`` where given (writable, of exactly that size), else in memory of its own.
        """
        place = (block_table, start, num_tokens, layer_start, num_layers)
        if self._ranks is None:
            with self._copies.reading():
                return self._cache.read(*place, out)
        with self._copies.reading():
            own = self._cache.read(*place)
        asked = ReadKv(self._ranks.range(*place))
        whole = join_heads([own, *self._ranks.ask([asked] * (self._ranks.size - 1))], self.layout)
        if out is None:
            return whole
        out[:] = whole
        return out

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
        if self._ranks is None:
            self._cache.write(block_table, start, num_tokens, layer_start, num_layers, payload)
            return
        own, *others = split_heads(payload, num_layers * num_tokens, self.layout, self._ranks.size)
        self._cache.write(block_table, start, num_tokens, layer_start, num_layers, own)
        place = self._ranks.range(block_table, start, num_tokens, layer_start, num_layers)
        self._ranks.ask([WriteKv(place, part) for part in others])

    def _run(
        self,
        plan: StepPlan,
        score: Callable[[Tensor], None] | None = None,
        on_layer: OnLayer | None = None,
    ) -> tuple[Tensor, tuple[float, float]]:
        """Logits of the chunks that sample, and the seconds of the copies (out, in)."""
        whole, grouped = split_chunks(plan)
        parts = [
            (chunks, build_inputs(replace(plan, chunks=chunks), self._shape))
            for chunks in (whole, grouped)
            if chunks
        ]
        # Only what this rank takes for a plan goes to the others.
        with nullcontext() if self._ranks is None else self._ranks.step(plan):
            seconds = self._copy(plan)
            logits = [
                self._forward(inputs, score, on_layer)
                if chunks is whole
                else self._layer_groups.forward(chunks, inputs, score)
                for chunks, inputs in parts
            ]
        rows = [part for part in logits if len(part)]
        if len(rows) == 1:
            return rows[0], seconds
        return torch.cat(rows) if rows else torch.empty((0, self.spec.vocab_size)), seconds

    def _copy(self, plan: StepPlan) -> tuple[float, float]:
        if not plan.swap_out and not plan.swap_in:
            return 0.0, 0.0
        if self._swap_space is None:
            raise InternalError(f"step {plan.step} swaps, and this engine has no swap_blocks")
        return self._swap_space.copy(plan.swap_out, plan.swap_in)

    def _forward(
        self,
        inputs: StepInputs,
        score: Callable[[Tensor], None] | None,
        on_layer: OnLayer | None,
    ) -> Tensor:
        replayed = None if self._graphs is None else self._graphs.logits(inputs)
        if replayed is not None:
            return replayed
        return self._decoder.forward(inputs, self._cache, score, on_layer)

    def _sample(
        self, logits: Tensor, chunks: Sequence[SequenceChunk]
    ) -> tuple[tuple[SampledToken, ...], tuple[FailedSequence, ...]]:
        bad = zero_bad_rows(logits)
        rows = [row for chunk in chunks for row in rows_of(chunk)]
        masks = self._masks.fill(rows)
        drawn = self._sampler.sample(logits, rows, masks)
        return kept_draws(chunks, drawn, masks.errors | dict.fromkeys(bad, NOT_FINITE))


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPE_BYTES:
        raise ConfigError(f"dtype is {name!r}; allowed: {', '.join(DTYPE_BYTES)}", param="dtype")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device(settings: LoadSettings) -> torch.device:
    """The only one, or with several ranks a GPU for each."""
    device = torch.device(settings.device)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ConfigError(
            "device is cuda, but torch sees no CUDA device here; set placement.device to cpu "
            "or install a CUDA build of torch on a machine with a GPU",
            param="placement.device",
        )
    if settings.num_ranks == 1:
        return device
    num_devices = torch.cuda.device_count()
    if num_devices < settings.num_ranks:
        raise ConfigError(
            f"tensor_parallel is {settings.num_ranks}; this worker sees {num_devices} GPUs; "
            "give it that many, or set tensor_parallel to at most that",
            param="tensor_parallel",
        )
    own = torch.device("cuda", settings.rank)
    torch.cuda.set_device(own)
    return own
