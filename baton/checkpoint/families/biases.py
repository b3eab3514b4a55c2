"""Which projections have a bias, as the families write it down."""

from __future__ import annotations

from dataclasses import dataclass

from baton.checkpoint.fields import Fields


@dataclass(frozen=True, slots=True)
class Biases:
    """Which projections have a bias: Q, K and V together; attention output; all of the MLP."""

    qkv: bool = False
    output: bool = False
    mlp: bool = False


def no_biases(config: Fields) -> Biases:
    """Raises for any that config.json asks for: the family has none."""
    _refuse(config, "attention_bias", "mlp_bias", "lm_head_bias")
    return Biases()


def attention_biases(config: Fields) -> Biases:
    """All of attention's projections or none, as ``attention_bias`` says."""
    _refuse(config, "mlp_bias")
    attention = config.boolean("attention_bias", False)
    return Biases(qkv=attention, output=attention)


def qkv_biases(config: Fields) -> Biases:
    """Q, K and V, always; ``attention_bias`` has no meaning."""
    _refuse(config, "mlp_bias")
    return Biases(qkv=True)


def attention_and_mlp_biases(config: Fields) -> Biases:
    attention = config.boolean("attention_bias", False)
    return Biases(qkv=attention, output=attention, mlp=config.boolean("mlp_bias", False))


def _refuse(config: Fields, *names: str) -> None:
    for name in names:
        if config.boolean(name, False):
            config.unsupported(name, "false in this family")
