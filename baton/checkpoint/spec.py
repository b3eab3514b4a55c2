"""What a checkpoint's config.json says, checked and in one spelling.

A ``ModelSpec`` that ``load_spec`` returned can be run; whatever cannot is refused here by the
name of the field. Families differ in a few fields: see ``families``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from baton.checkpoint.families import FAMILIES, ExpertSpec, Family, Scales, TensorNames
from baton.checkpoint.fields import Fields, read_json_object
from baton.checkpoint.find import CONFIG_FILE
from baton.checkpoint.rope_fields import RopeContext, RopeSpec, reach

GENERATION_CONFIG_FILE = "generation_config.json"

MAX_VOCAB_SIZE = 2**24
MAX_WIDTH = 2**20
MAX_LAYERS = 1_024
MAX_HEADS = 1_024
MAX_HEAD_DIM = 1_024
MAX_POSITIONS = 2**26

_DTYPES = ("float32", "bfloat16", "float16")
Activation = Literal["silu", "gelu_tanh"]
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

_NOT_QUANTISED = (
    "weights in float32, bfloat16 or float16 that are not quantised "
    "(take the checkpoint that this one was made from)"
)
_ONE_SHAPE = "layers that all have the same heads and sizes"
_TEXT_ONLY = "decoders of text alone"
_REFUSED = {
    "quantization_config": _NOT_QUANTISED,
    "compression_config": _NOT_QUANTISED,
    "is_encoder_decoder": "decoders without an encoder",
    "add_cross_attention": "decoders without an encoder",
    "use_bidirectional_attention": "causal attention",
    "vision_config": _TEXT_ONLY,
    "audio_config": _TEXT_ONLY,
    "block_configs": _ONE_SHAPE,
    "per_layer_config": _ONE_SHAPE,
    "global_head_dim": _ONE_SHAPE,
}
"""Field -> what is supported instead; refused unless absent, null, false, 0 or empty."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer with RMSNorm, RoPE, grouped-query attention and a gated MLP.

    max_position_embeddings: how many positions can be served (see ``rope_fields.reach``).
    ropes, sliding_windows, experts: one entry per layer. sliding_windows: how many newest tokens
      (itself included) a token sees; None for all. experts: None for a plain MLP of
      intermediate_size, which is 0 when every layer has experts.
    qkv_bias / output_bias: of the attention projections. qk_norm: RMSNorm over each head of Q
      and K before RoPE. norm_offset: what norms multiply with is the stored weight plus this.
    eos_token_ids: of generation_config.json and config.json together. dtype: what the weights
      are stored in. names: what the checkpoint calls its tensors.
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
    norm_offset: float
    activation: Activation
    scales: Scales
    ropes: tuple[RopeSpec, ...]
    tie_word_embeddings: bool
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]
    experts: tuple[ExpertSpec | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str
    names: TensorNames

    @property
    def variant(self) -> str:
        """What tells its KV from that of another spec of the same folder; mostly nothing."""
        return "beyond_original" if any(rope.beyond_original for rope in self.ropes) else ""


def load_spec(folder: Path, max_model_len: int | None = None) -> ModelSpec:
    """Read config.json (old or new spelling) and generation_config.json of ``folder``.

    max_model_len: the longest sequence that is to be served. It decides how a model with longrope
    turns all its sequences; without it, that is the way of the short ones.

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
    windows = family.sliding_windows(config, num_layers)
    experts = family.experts(config, num_layers)
    context = RopeContext(
        max_positions=max_positions,
        max_model_len=max_model_len,
        head_dim=head_dim,
        default_theta=family.default_theta,
        partial_rotary=family.partial_rotary,
    )
    ropes = family.ropes(config, windows, context)
    served = min(reach(rope, max_positions) for rope in ropes)
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
        intermediate_size=config.integer("intermediate_size", 1, MAX_WIDTH)
        if None in experts
        else 0,
        rms_norm_eps=config.number("rms_norm_eps", 0.0, 1.0, default=family.default_rms_norm_eps),
        norm_offset=family.norm_offset,
        activation=_read_activation(config, family),
        scales=family.scales(config, hidden_size, head_dim),
        ropes=ropes,
        tie_word_embeddings=config.boolean("tie_word_embeddings", family.tied_by_default),
        max_position_embeddings=served,
        # A window that no sequence outgrows is none: full attention has the faster ways.
        sliding_windows=tuple(w if w is not None and w < served else None for w in windows),
        experts=experts,
        qkv_bias=biases.qkv,
        output_bias=biases.output,
        mlp_bias=biases.mlp,
        qk_norm=family.qk_norm,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        dtype=_read_dtype(config),
        names=family.names,
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
    """Fields that would change the arithmetic, whatever the architecture says."""
    quantization = config.inner("quantization_config")
    if quantization is not None and quantization.has("quant_method"):
        quantization.unsupported("quant_method", _NOT_QUANTISED)
    for name, supported in _REFUSED.items():
        if config.values.get(name):
            config.unsupported(name, supported)


def _read_activation(config: Fields, family: Family) -> Activation:
    name = config.text(family.activation_field) or family.default_activation
    if name not in _ACTIVATIONS:
        config.unsupported(family.activation_field, ", ".join(sorted(_ACTIVATIONS)))
    return _ACTIVATIONS[name]


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
