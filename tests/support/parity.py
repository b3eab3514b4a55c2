"""Random-weight models of every family, run by us through random block tables and chunks, and
compared with ``transformers`` position by position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from baton.engine.executor import Executor
from baton.engine.plan import SequenceChunk, StepPlan
from baton.protocol.sampling import SamplingParams

NUM_TOKENS = 128
MAX_LOGIT_DIFFERENCE = 1e-4
BLOCK_SIZE = 16
NUM_BLOCKS = 480
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)

LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
}
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "partial_rotary_factor": 0.5,
}

Config = Callable[[], transformers.PretrainedConfig]


def _sized(kind: Callable[..., transformers.PretrainedConfig], **changes: Any) -> Config:
    return lambda: kind(**(SIZES | changes))


MAIN_CONFIGS: dict[str, Config] = {
    "llama-mha": _sized(transformers.LlamaConfig, num_key_value_heads=4),
    "llama-rope3-biases": _sized(
        transformers.LlamaConfig,
        rope_parameters=dict(LLAMA3_ROPE),
        attention_bias=True,
        mlp_bias=True,
    ),
    "mistral-window": _sized(transformers.MistralConfig, sliding_window=50),
    "qwen2-upper-window": _sized(
        transformers.Qwen2Config,
        use_sliding_window=True,
        sliding_window=40,
        max_window_layers=1,
    ),
    "qwen3": _sized(transformers.Qwen3Config, head_dim=32),
    "mixtral": _sized(
        transformers.MixtralConfig, intermediate_size=48, num_local_experts=4, head_dim=16
    ),
    "qwen3-moe": _sized(
        transformers.Qwen3MoeConfig,
        head_dim=24,
        num_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=40,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "phi3-partial": _sized(
        transformers.Phi3Config,
        sliding_window=70,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.75,
        },
    ),
    "gemma2": _sized(
        transformers.Gemma2Config,
        head_dim=24,
        sliding_window=60,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=8.0,
        tie_word_embeddings=True,
    ),
    "gemma3": _sized(
        transformers.Gemma3TextConfig,
        head_dim=24,
        sliding_window=60,
        query_pre_attn_scalar=20,
        tie_word_embeddings=True,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}
"""These run with all prompts."""

VARIANT_CONFIGS: dict[str, Config] = {
    "llama-tied": _sized(transformers.LlamaConfig, tie_word_embeddings=True),
    "llama-mqa-linear": _sized(
        transformers.LlamaConfig,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    ),
    "llama-yarn": _sized(transformers.LlamaConfig, rope_parameters=dict(YARN_ROPE)),
    "qwen2-yarn-mscale-tied": _sized(
        transformers.Qwen2Config,
        tie_word_embeddings=True,
        rope_parameters=YARN_ROPE
        | {
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.9,
            "mscale_all_dim": 0.7,
            "truncate": False,
        },
    ),
    "llama-dynamic-within": _sized(
        transformers.LlamaConfig,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0},
    ),
    "mistral-full": _sized(transformers.MistralConfig, head_dim=24, sliding_window=None),
    "qwen3-moe-step": _sized(
        transformers.Qwen3MoeConfig,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        decoder_sparse_step=2,
        use_sliding_window=True,
        sliding_window=40,
    ),
    "mixtral-window": _sized(transformers.MixtralConfig, num_local_experts=3, sliding_window=50),
    "phi3-longrope": _sized(
        transformers.Phi3Config,
        max_position_embeddings=4096,
        original_max_position_embeddings=1024,
        rope_parameters=dict(LONGROPE),
    ),
    "gemma3-scaled": _sized(
        transformers.Gemma3TextConfig,
        head_dim=16,
        sliding_window=30,
        query_pre_attn_scalar=16,
        final_logit_softcapping=10.0,
        attention_bias=True,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
        },
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
}


def save_random_model(config: transformers.PretrainedConfig, folder: Path) -> None:
    """Every tensor random: norms that start at one and biases at zero would hide mistakes."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config)
    stored_less_one = config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                centre = 1.0 if "norm" in name and not stored_less_one else 0.0
                parameter.copy_(centre + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size="60KB")


def load(
    folder: Path,
    dtype: str = "float32",
    *,
    device: str = "cpu",
    deterministic: bool = False,
    max_model_len: int | None = None,
) -> Executor:
    return Executor.load(
        folder,
        dtype=dtype,
        device=device,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_threads=1,
        deterministic=deterministic,
        max_model_len=max_model_len,
    )


def load_reference(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@dataclass
class Stream:
    """One prompt, what was drawn after it, and the logits that each draw came from."""

    seq_id: str
    tokens: list[int]
    num_prompt_tokens: int
    block_table: tuple[int, ...]
    num_computed: int = 0
    logits: list[Tensor] = field(default_factory=list)

    @property
    def num_new(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens


def make_sequences(
    vocab_size: int, prompt_tokens: Sequence[int], rng: np.random.Generator
) -> list[Stream]:
    free = list(rng.permutation(NUM_BLOCKS))
    sequences = []
    for n, length in enumerate(prompt_tokens):
        num_blocks = -(-(length + NUM_TOKENS) // BLOCK_SIZE)
        table, free = free[:num_blocks], free[num_blocks:]
        prompt = rng.integers(3, vocab_size, size=length).tolist()
        sequences.append(Stream(f"s{n}", prompt, length, tuple(int(b) for b in table)))
    return sequences


def next_plan(
    step: int, sequences: list[Stream], rng: np.random.Generator, num_tokens: int
) -> StepPlan:
    """One token of every sequence that decodes, and random chunks of up to two prompts."""
    chunks: list[SequenceChunk] = []
    num_prompts = 0
    for s in sequences:
        pending = len(s.tokens) - s.num_computed
        if s.num_new >= num_tokens:
            continue
        if s.num_computed < s.num_prompt_tokens:
            if num_prompts == 2:
                continue
            num_prompts += 1
            pending = min(pending, int(rng.integers(1, 400)))
        end = s.num_computed + pending
        chunks.append(
            SequenceChunk(
                seq_id=s.seq_id,
                token_ids=tuple(s.tokens[s.num_computed : end]),
                start=s.num_computed,
                block_table=s.block_table[: -(-end // BLOCK_SIZE)],
                samples=end == len(s.tokens),
                sampling=GREEDY,
            )
        )
    rng.shuffle(chunks)  # type: ignore[arg-type]
    return StepPlan(step, tuple(chunks))


def run_greedy(
    executor: Executor,
    sequences: list[Stream],
    rng: np.random.Generator,
    num_tokens: int = NUM_TOKENS,
) -> None:
    """Greedy by the logits' own maximum, so that one forward pass gives token and evidence."""
    by_id = {s.seq_id: s for s in sequences}
    step = 0
    while any(s.num_new < num_tokens for s in sequences):
        plan = next_plan(step, sequences, rng, num_tokens)
        logits = executor.forward_logits(plan).cpu()
        sampling = [c for c in plan.chunks if c.samples]
        drawn = logits.argmax(dim=-1).tolist()
        for chunk, row, token_id in zip(sampling, logits, drawn, strict=True):
            by_id[chunk.seq_id].logits.append(row)
            by_id[chunk.seq_id].tokens.append(token_id)
        for chunk in plan.chunks:
            by_id[chunk.seq_id].num_computed += len(chunk.token_ids)
        step += 1


@torch.inference_mode()
def reference_logits(model: Any, s: Stream) -> Tensor:
    """``[num_new, vocab]`` float32, in one pass over prompt and continuation."""
    ids = torch.tensor([s.tokens[:-1]])
    found: Tensor = model(ids, use_cache=False).logits[0, s.num_prompt_tokens - 1 :]
    return found.float()


@torch.inference_mode()
def logits_token_by_token(model: Any, s: Stream) -> Tensor:
    """Like ``reference_logits``, with every token, of the prompt too, in a pass of its own."""
    cache = transformers.DynamicCache(config=model.config)
    rows = []
    for token in s.tokens[:-1]:
        logits = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits
        rows.append(logits[0, -1].float())
    return torch.stack(rows[s.num_prompt_tokens - 1 :])


@dataclass
class Comparison:
    num_tokens: int = 0
    near_ties: int = 0
    largest_difference: float = 0.0

    def add(self, s: Stream, expected: Tensor) -> None:
        """Each drawn token must be the reference's best, or as good within the tolerance."""
        ours = torch.stack(s.logits)
        assert ours.shape == expected.shape
        difference = (ours - expected).abs().max().item()
        assert difference <= MAX_LOGIT_DIFFERENCE, f"{s.seq_id}: logits differ by {difference}"
        self.largest_difference = max(self.largest_difference, difference)
        drawn = torch.tensor(s.tokens[s.num_prompt_tokens :])
        best = expected.topk(2).values
        other = (expected.argmax(dim=-1) != drawn).nonzero()[:, 0].tolist()
        for position in other:
            gap = (best[position, 0] - best[position, 1]).item()
            assert gap <= MAX_LOGIT_DIFFERENCE, f"{s.seq_id} at {position}: no tie, gap {gap}"
        self.near_ties += len(other)
        self.num_tokens += len(drawn)
