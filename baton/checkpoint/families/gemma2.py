"""Gemma 2: norms around each block, soft caps, a window in every other layer."""

from baton.checkpoint.families.biases import attention_biases
from baton.checkpoint.families.family import Family, Scales
from baton.checkpoint.families.names import TensorNames
from baton.checkpoint.families.windows import in_a_pattern
from baton.checkpoint.fields import Fields

MAX_SCALE = 1e6
GEMMA_NAMES = TensorNames(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def gemma_scales(
    config: Fields, hidden_size: int, *, default_caps: tuple[float | None, float | None]
) -> Scales:
    """default_caps: of scores and of logits, where the field is absent; null means none."""

    def cap(name: str, default: float | None) -> float | None:
        if config.has(name):
            return config.number(name, 1e-3, MAX_SCALE)
        return None if name in config.values else default

    return Scales(
        attention=config.number("query_pre_attn_scalar", 1e-3, MAX_SCALE, default=256.0) ** -0.5,
        attention_soft_cap=cap("attn_logit_softcapping", default_caps[0]),
        embedding=hidden_size**0.5,
        logit_soft_cap=cap("final_logit_softcapping", default_caps[1]),
    )


def _scales(config: Fields, hidden_size: int, head_dim: int) -> Scales:
    return gemma_scales(config, hidden_size, default_caps=(50.0, 30.0))


def _windows(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    return in_a_pattern(config, num_layers, period=2)


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    biases=attention_biases,
    sliding_windows=_windows,
    default_head_dim=256,
    names=GEMMA_NAMES,
    scales=_scales,
    norm_offset=1.0,
    activation_field="hidden_activation",
    default_activation="gelu_pytorch_tanh",
    tied_by_default=True,
)
