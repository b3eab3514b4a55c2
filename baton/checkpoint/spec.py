"""What a checkpoint's config.json says, checked and in one spelling.

A ``ModelSpec`` that ``load_spec`` returned can be run; whatever cannot is refused here by the
name of the field. Families differ in a few fields: see ``families``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from baton.checkpoint.families import FAMILIES, Family
from baton.checkpoint.fields import Fields, read_json_object
from baton.checkpoint.find import CONFIG_FILE
from baton.checkpoint.rope_fields import RopeSpec, read_rope

GENERATION_CONFIG_FILE = "generation_config.json"

MAX_VOCAB_SIZE = 2**24
MAX_WIDTH = 2**20
MAX_LAYERS = 1_024
MAX_HEADS = 1_024
MAX_HEAD_DIM = 1_024
MAX_POSITIONS = 2**26

_DTYPES = ("float32", "bfloat16", "float16")
_ACTIVATIONS = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer with RMSNorm, RoPE, grouped-query attention and a gated MLP.

    sliding_windows: per layer, how many newest tokens (itself included) a token sees; None
      for all. qkv_bias / output_bias: of the attention projections. qk_norm: RMSNorm over
      each head of Q and K before RoPE. eos_token_ids: of generation_config.json and
      config.json together. dtype: what the weights are stored in.
    """

    family: str
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeSpec
    tie_word_embeddings: bool
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str


def load_spec(folder: Path) -> ModelSpec:
    """Read config.json (old or new spelling) and generation_config.json of ``folder``.

    Raises UnsupportedModel for what this engine does not run and ConfigError for what is
    missing, of a wrong type or beyond a cap; both name the field, its value and the way out.
    """
    path = folder / CONFIG_FILE
    config = Fields(str(path), read_json_object(path))
    architecture, family = _read_family(config)
    _refuse_unsupported(config)

    vocab_size = config.integer("vocab_size", 1, MAX_VOCAB_SIZE)
    num_layers = config.integer("num_hidden_layers", 1, MAX_LAYERS)
    max_positions = config.integer("max_position_embeddings", 1, MAX_POSITIONS)
    hidden_size, num_heads, num_kv_heads, head_dim = _read_heads(config, family)
    biases = family.biases(config)
    bos_token_id, eos_token_ids = _read_special_ids(folder, config, vocab_size)
    return ModelSpec(
        family=family.name,
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size", 1, MAX_WIDTH),
        rms_norm_eps=config.number("rms_norm_eps", 0.0, 1.0, default=1e-6),
        rope=read_rope(config, max_positions),
        tie_word_embeddings=config.boolean("tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        sliding_windows=family.sliding_windows(config, num_layers),
        qkv_bias=biases.qkv,
        output_bias=biases.output,
        mlp_bias=biases.mlp,
        qk_norm=family.qk_norm,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        dtype=_read_dtype(config),
    )


def _read_family(config: Fields) -> tuple[str, Family]:
    """``architectures`` says which model; ``model_type`` stands in for it or must agree."""
    known = ", ".join(sorted(f.architecture for f in FAMILIES.values()))
    model_type = config.text("model_type")
    architectures = config.texts("architectures")
    if not architectures:
        if model_type is None:
            config.malformed("architectures", f"one of {known}")
        family = FAMILIES.get(model_type)
        if family is None:
            config.unsupported("model_type", ", ".join(sorted(FAMILIES)))
        return family.architecture, family
    matches = [f for f in FAMILIES.values() if architectures == (f.architecture,)]
    if not matches:
        config.unsupported("architectures", known)
    if model_type is not None and model_type != matches[0].name:
        config.unsupported("model_type", f"{matches[0].name} beside {architectures[0]}")
    return architectures[0], matches[0]


def _refuse_unsupported(config: Fields) -> None:
    for name in ("quantization_config", "compression_config"):
        if config.has(name):
            config.unsupported(name, "weights that are not quantised (float32, bfloat16, float16)")
    activation = config.text("hidden_act")
    if activation is not None and activation not in _ACTIVATIONS:
        config.unsupported("hidden_act", "silu")


def _read_heads(config: Fields, family: Family) -> tuple[int, int, int, int]:
    """hidden_size, num_heads, num_kv_heads, head_dim."""
    hidden_size = config.integer("hidden_size", 1, MAX_WIDTH)
    num_heads = config.integer("num_attention_heads", 1, MAX_HEADS)
    absent = "num_key_value_heads" not in config.values
    if absent and family.kv_heads_required:
        config.malformed("num_key_value_heads", f"an integer from 1 to {num_heads}")
    num_kv_heads = config.integer("num_key_value_heads", 1, num_heads, default=num_heads)
    if num_heads % num_kv_heads:
        config.unsupported("num_key_value_heads", f"a divisor of num_attention_heads {num_heads}")
    head_dim = family.default_head_dim
    if not config.has("head_dim") and head_dim is None:
        if hidden_size % num_heads:
            config.unsupported(
                "hidden_size", f"a multiple of num_attention_heads {num_heads}, or a head_dim field"
            )
        head_dim = hidden_size // num_heads
    head_dim = config.integer("head_dim", 1, MAX_HEAD_DIM, default=head_dim)
    if head_dim % 2:
        config.unsupported("head_dim", "even numbers: RoPE turns pairs")
    return hidden_size, num_heads, num_kv_heads, head_dim


def _read_dtype(config: Fields) -> str:
    name = "dtype" if config.has("dtype") else "torch_dtype"
    dtype = config.text(name)
    if dtype is None:
        return "float32"
    dtype = dtype.removeprefix("torch.")
    if dtype not in _DTYPES:
        config.unsupported(name, ", ".join(_DTYPES))
    return dtype


def _read_special_ids(
    folder: Path, config: Fields, vocab_size: int
) -> tuple[int | None, tuple[int, ...]]:
    """Beginning id and end ids. Chat checkpoints often name an end id in one file only."""
    sources = [config]
    path = folder / GENERATION_CONFIG_FILE
    if path.is_file():
        sources.insert(0, Fields(str(path), read_json_object(path)))
    begins = [i for source in sources for i in source.token_ids("bos_token_id", vocab_size)]
    ends = [i for source in sources for i in source.token_ids("eos_token_id", vocab_size)]
    return (begins[0] if begins else None), tuple(dict.fromkeys(ends))
