"""Sliding-window attention as the families write it down."""

from __future__ import annotations

from baton.checkpoint.fields import Fields

MAX_WINDOW = 2**26
FULL, SLIDING = "full_attention", "sliding_attention"


def read_layer_types(config: Fields, num_layers: int) -> tuple[str, ...] | None:
    """None when absent. Raises for kinds other than full and sliding, or a wrong length."""
    kinds = config.texts("layer_types")
    if kinds is None:
        return None
    if len(kinds) != num_layers:
        config.malformed("layer_types", f"{num_layers} entries, one per layer")
    if not set(kinds) <= {FULL, SLIDING}:
        config.unsupported("layer_types", f"{FULL}, {SLIDING}")
    return kinds


def full_attention_only(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Llama: ``sliding_window`` has no meaning there, sliding ``layer_types`` are refused."""
    if SLIDING in (read_layer_types(config, num_layers) or ()):
        config.unsupported("layer_types", f"{FULL} in this family")
    return (None,) * num_layers


def same_in_all_layers(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: null is full attention; absent means 4096, the family's first model."""
    window = None
    if config.has("sliding_window") or "sliding_window" not in config.values:
        window = config.integer("sliding_window", 1, MAX_WINDOW, default=4_096)
    return _uniform(config, window, num_layers)


def same_in_all_layers_if_given(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Mixtral, Phi-3: absent and null both are full attention."""
    window = None
    if config.has("sliding_window"):
        window = config.integer("sliding_window", 1, MAX_WINDOW)
    return _uniform(config, window, num_layers)


def same_in_all_layers_if_used(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Qwen3-MoE: off unless ``use_sliding_window``; ``max_window_layers`` has no meaning."""
    if not config.boolean("use_sliding_window", False):
        return _uniform(config, None, num_layers)
    return same_in_all_layers_if_given(config, num_layers)


def _uniform(config: Fields, window: int | None, num_layers: int) -> tuple[int | None, ...]:
    expected = FULL if window is None else SLIDING
    if set(read_layer_types(config, num_layers) or (expected,)) != {expected}:
        config.unsupported("layer_types", f"{expected} in all layers, as sliding_window says")
    return (window,) * num_layers


def in_a_pattern(config: Fields, num_layers: int, period: int) -> tuple[int | None, ...]:
    """Gemma: by ``layer_types``; where absent, full attention in every ``period``-th layer."""
    window = config.integer("sliding_window", 1, MAX_WINDOW, default=4_096)
    kinds = read_layer_types(config, num_layers)
    if kinds is None:
        kinds = tuple(SLIDING if (n + 1) % period else FULL for n in range(num_layers))
    return tuple(window if kind == SLIDING else None for kind in kinds)


def in_upper_layers(config: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Qwen: off unless ``use_sliding_window``; then by ``layer_types``, else by
    ``max_window_layers``, the number of lowest layers that keep full attention."""
    window = None
    if config.boolean("use_sliding_window", False) and config.has("sliding_window"):
        window = config.integer("sliding_window", 1, MAX_WINDOW)
    kinds = read_layer_types(config, num_layers)
    if kinds is None:
        first = config.integer("max_window_layers", 0, MAX_WINDOW, default=28)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if SLIDING in kinds and window is None:
        config.unsupported("layer_types", f"{FULL} unless use_sliding_window and sliding_window")
    return tuple(window if kind == SLIDING else None for kind in kinds)
