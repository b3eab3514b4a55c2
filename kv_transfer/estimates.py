"""Running estimates of what codecs and computing again cost. Pure; ``link_estimate`` has links.

Every estimate is a ratio of two fading sums (bytes over seconds, coded over raw bytes), so that
a long sample weighs more than a short one and the newest more than all before. Times are given
by the caller; bytes are raw KV bytes unless called coded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

FADE = 0.85
"""What is left of older samples' weight when a new one comes."""
FORGET = 0.97
"""Likewise of what is known of a codec whenever another is used: one that was slow once, while the
machine did something else, is tried again after some dozen frames."""
PRIOR_BYTES = 16_384
"""Raw bytes of samples that a prior weighs as much as."""


@dataclass(slots=True)
class Ratio:
    """``amount`` over ``base``, with a prior that weighs little."""

    prior: float
    amount: float = 0.0
    base: float = 0.0

    @property
    def value(self) -> float:
        return (self.amount + self.prior * PRIOR_BYTES) / (self.base + PRIOR_BYTES)

    def fade(self, part: float) -> None:
        self.amount *= part
        self.base *= part

    def add(self, amount: float, base: float, fade: float = FADE) -> None:
        if base <= 0.0 or amount < 0.0:
            return
        self.fade(fade)
        self.amount += amount
        self.base += base


class CodecCost(NamedTuple):
    """ratio: coded bytes by raw bytes. Seconds are for one byte of raw KV."""

    ratio: float
    encode_s: float
    decode_s: float


PRIOR_COSTS: Mapping[str, CodecCost] = {
    "raw": CodecCost(1.0, 0.25e-9, 0.4e-9),
    "split": CodecCost(0.78, 1.2e-9, 1.2e-9),
    "entropy": CodecCost(0.66, 2.2e-9, 2.2e-9),
    "int8": CodecCost(0.53, 1.2e-9, 0.8e-9),
    "fp8": CodecCost(0.5, 1.2e-9, 0.8e-9),
    "int4": CodecCost(0.28, 1.2e-9, 0.8e-9),
    "kv1": CodecCost(0.05, 3.0e-9, 3.0e-9),
    "kv2": CodecCost(0.03, 3.0e-9, 3.0e-9),
    "kv3": CodecCost(0.02, 3.0e-9, 3.0e-9),
    "kv4": CodecCost(0.01, 3.0e-9, 3.0e-9),
}
"""Of one core and bfloat16, until there are samples. Rather too good than too bad: what looks
too good is tried, and then known."""
UNKNOWN_COST = CodecCost(0.5, 2e-9, 2e-9)


class CodecEstimates:
    """What codecs cost: encoding here, whatever the peer; ``decode`` is one peer's."""

    def __init__(self, priors: Mapping[str, CodecCost] = PRIOR_COSTS) -> None:
        self._priors = priors
        self._ratio: dict[str, Ratio] = {}
        self._encode: dict[str, Ratio] = {}

    def prior(self, codec: str) -> CodecCost:
        return self._priors.get(codec, UNKNOWN_COST)

    def encoded(self, codec: str, num_bytes: int, num_coded: int, seconds: float) -> None:
        """A frame was read and encoded; seconds: of both, and of waiting for the thread."""
        prior = self.prior(codec)
        for other, known in self._encode.items():
            if other != codec:
                known.fade(FORGET)
        self._ratio.setdefault(codec, Ratio(prior.ratio)).add(num_coded, num_bytes)
        self._encode.setdefault(codec, Ratio(prior.encode_s)).add(seconds, num_bytes)

    def cost(self, codec: str, decode: DecodeEstimates) -> CodecCost:
        prior = self.prior(codec)
        ratio, encode = self._ratio.get(codec), self._encode.get(codec)
        return CodecCost(
            prior.ratio if ratio is None else ratio.value,
            prior.encode_s if encode is None else encode.value,
            decode.seconds(codec, prior.decode_s),
        )


class DecodeEstimates:
    """Seconds that a peer takes to decode and write a raw byte, by codec."""

    def __init__(self) -> None:
        self._of: dict[str, Ratio] = {}

    def seconds(self, codec: str, prior: float) -> float:
        known = self._of.get(codec)
        return prior if known is None else known.value

    def decoded(self, num_bytes: Mapping[str, int], seconds: float, priors: CodecEstimates) -> None:
        """num_bytes: by codec, of frames whose decoding took ``seconds`` together."""
        expected = {
            codec: count * self.seconds(codec, priors.prior(codec).decode_s)
            for codec, count in num_bytes.items()
        }
        total = sum(expected.values())
        for other, known in self._of.items():
            if other not in num_bytes:
                known.fade(FORGET)
        for codec, count in num_bytes.items():
            share = seconds * expected[codec] / total if total else seconds / len(num_bytes)
            prior = priors.prior(codec).decode_s
            self._of.setdefault(codec, Ratio(prior)).add(share, count)


class ComputeEstimate:
    """Seconds to compute KV from tokens: a part for each token, and one for each that it looks
    back at. Least squares over fading samples; infinite until there is one."""

    def __init__(self) -> None:
        self._xx = self._xz = self._zz = self._xy = self._zy = 0.0

    def computed(self, start: int, stop: int, seconds: float) -> None:
        x, z = _work(start, stop)
        if x <= 0.0 or seconds <= 0.0:
            return
        weight = 1.0 / x
        for name, value in (
            ("_xx", x * x),
            ("_xz", x * z),
            ("_zz", z * z),
            ("_xy", x * seconds),
            ("_zy", z * seconds),
        ):
            setattr(self, name, 0.9 * getattr(self, name) + weight * value)

    def seconds(self, start: int, stop: int) -> float:
        x, z = _work(start, stop)
        if x <= 0.0:
            return 0.0
        if not self._xx:
            return float("inf")
        by_token = self._xy / self._xx
        by_context = 0.0
        determinant = self._xx * self._zz - self._xz * self._xz
        if determinant > 1e-3 * self._xx * self._zz:
            one = (self._xy * self._zz - self._zy * self._xz) / determinant
            two = (self._zy * self._xx - self._xy * self._xz) / determinant
            if one > 0.0 and two > 0.0:
                by_token, by_context = one, two
        return by_token * x + by_context * z


def _work(start: int, stop: int) -> tuple[float, float]:
    """Tokens, and (in thousands) pairs of a token and one before it."""
    return float(stop - start), (stop * stop - start * start) / 2e3
