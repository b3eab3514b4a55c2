"""Codecs by their wire names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

from baton.protocol.errors import ConfigError
from kv_transfer.codecs import (
    entropy_compiled,
    entropy_reference,
    fp8_compiled,
    fp8_reference,
    integers_compiled,
    integers_reference,
    split_compiled,
    split_reference,
)
from kv_transfer.codecs.contract import Codec, Implementation, KvGeometry, Quality
from kv_transfer.codecs.entropy import EntropyCodec
from kv_transfer.codecs.fp8 import Fp8Codec
from kv_transfer.codecs.integers import IntegerCodec
from kv_transfer.codecs.lossy import LossyCodec
from kv_transfer.codecs.lossy_plain import LEVELS, PlainLossyCodec
from kv_transfer.codecs.lossy_profile import Profile
from kv_transfer.codecs.raw import RawCodec
from kv_transfer.codecs.split import SplitCodec

log = logging.getLogger(__name__)


def _split(geometry: KvGeometry, implementation: Implementation) -> Codec:
    return SplitCodec(geometry, _either(implementation, split_compiled, split_reference))


def _entropy(geometry: KvGeometry, implementation: Implementation) -> Codec:
    return EntropyCodec(geometry, _either(implementation, entropy_compiled, entropy_reference))


def _int8(geometry: KvGeometry, implementation: Implementation) -> Codec:
    kernels = _either(implementation, integers_compiled, integers_reference)
    return IntegerCodec(geometry, 8, Quality.HIGH, kernels)


def _int4(geometry: KvGeometry, implementation: Implementation) -> Codec:
    kernels = _either(implementation, integers_compiled, integers_reference)
    return IntegerCodec(geometry, 4, Quality.MEDIUM, kernels)


def _fp8(geometry: KvGeometry, implementation: Implementation) -> Codec:
    return Fp8Codec(geometry, _either(implementation, fp8_compiled, fp8_reference))


_MAKERS: dict[str, Callable[[KvGeometry, Implementation], Codec]] = {
    "raw": lambda geometry, implementation: RawCodec(geometry),
    "split": _split,
    "entropy": _entropy,
    "int8": _int8,
    "fp8": _fp8,
    "int4": _int4,
}
WITHOUT_PROFILE = tuple(_MAKERS)
"""Names of the codecs that need no statistics of the model."""


LOSSY = tuple(LEVELS)
"""Names of the codecs that are meant to have a profile (``lossy_profile``)."""


def make(
    name: str,
    geometry: KvGeometry,
    implementation: Implementation = "compiled",
    profile: Profile | None = None,
) -> Codec:
    """profile: of the model, for ``LOSSY``; without one they assume a distribution, and a warning
    says so once. Raises ConfigError for a name that is no codec's, and for another model's
    profile."""
    if name in LOSSY and profile is not None:
        return LossyCodec(geometry, profile, name, implementation)
    if name in LOSSY:
        _warn_once()
        return PlainLossyCodec(geometry, name, implementation)
    if name not in _MAKERS:
        known = ", ".join((*WITHOUT_PROFILE, *LOSSY))
        raise ConfigError(f"no KV codec {name!r}; there are {known}")
    return _MAKERS[name](geometry, implementation)


@cache
def _warn_once() -> None:
    log.warning(
        "the model has no KV codec profile: lossy codecs send several times as much, at a loss "
        "that nobody has measured; make one with: baton calibrate MODEL"
    )


def _either(implementation: Implementation, compiled: ModuleType, reference: ModuleType) -> Any:
    return compiled if implementation == "compiled" else reference
