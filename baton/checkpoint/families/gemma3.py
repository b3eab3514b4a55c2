"""Gemma 3 (text): Gemma 2 with normalised heads, no caps, and RoPE by kind of layer."""

from baton.checkpoint.families.biases import attention_biases
from baton.checkpoint.families.family import Family, Scales
from baton.checkpoint.families.gemma2 import GEMMA_NAMES, gemma_scales
from baton.checkpoint.families.windows import FULL, SLIDING, in_a_pattern
from baton.checkpoint.fields import Fields
from baton.checkpoint.rope_fields import MAX_THETA, RopeContext, RopeSpec, read_parameters


def _scales(config: Fields, hidden_size: int, head_dim: int) -> Scales:
    return gemma_scales(config, hidden_size, default_caps=(None, None))


def _windows(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    old, new = "sliding_window_pattern", "_sliding_window_pattern"
    period = config.integer(old if config.has(old) else new, 1, 1_024, default=6)
    return in_a_pattern(config, num_layers, period)


def _ropes(
    config: Fields, windows: tuple[int | None, ...], context: RopeContext
) -> tuple[RopeSpec, ...]:
    """Scaling is for layers with full attention; those with a window have a base of their own."""
    theta = config.number("rope_theta", 1.0, MAX_THETA, default=1_000_000.0)
    local_theta = config.number("rope_local_base_freq", 1.0, MAX_THETA, default=10_000.0)
    nested = config.inner("rope_parameters") or Fields(f"{config.where}: rope_parameters", {})
    for name in nested.values:
        if name not in (FULL, SLIDING):
            nested.unsupported(name, f"one object each for {FULL} and {SLIDING}")
    absent = Fields(nested.where, {})
    scaling = config.inner("rope_scaling") or nested.inner(FULL) or absent
    full = read_parameters(config, scaling, theta, context)
    local = read_parameters(config, nested.inner(SLIDING) or absent, local_theta, context)
    return tuple(full if window is None else local for window in windows)


GEMMA3 = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    biases=attention_biases,
    sliding_windows=_windows,
    qk_norm=True,
    default_head_dim=256,
    names=GEMMA_NAMES,
    ropes=_ropes,
    scales=_scales,
    norm_offset=1.0,
    activation_field="hidden_activation",
    default_activation="gelu_pytorch_tanh",
    tied_by_default=True,
)
