"""Random draws of a workload: when requests arrive and how long they are. Pure, by seed."""

from __future__ import annotations

import math
from random import Random
from typing import Annotated

import msgspec
from msgspec import Meta

PositiveInt = Annotated[int, Meta(ge=1)]
PositiveFloat = Annotated[float, Meta(gt=0.0)]


class _Lengths(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="distribution"
):
    pass


class Fixed(_Lengths, frozen=True, tag="fixed"):
    tokens: PositiveInt

    @property
    def most(self) -> int:
        return self.tokens

    def problem(self) -> str | None:
        return None

    def draw(self, random: Random) -> int:
        return self.tokens


class Uniform(_Lengths, frozen=True, tag="uniform"):
    """Every length from ``min`` to ``max`` is as likely; both are included."""

    min: PositiveInt
    max: PositiveInt

    @property
    def most(self) -> int:
        return self.max

    def problem(self) -> str | None:
        return _order_problem(self.min, self.max)

    def draw(self, random: Random) -> int:
        return random.randint(self.min, self.max)


class Lognormal(_Lengths, frozen=True, tag="lognormal"):
    """``sigma`` of the logarithm; what falls outside ``min`` to ``max`` is moved to the edge."""

    median: PositiveFloat
    sigma: PositiveFloat
    min: PositiveInt
    max: PositiveInt

    @property
    def most(self) -> int:
        return self.max

    def problem(self) -> str | None:
        return _order_problem(self.min, self.max)

    def draw(self, random: Random) -> int:
        length = random.lognormvariate(math.log(self.median), self.sigma)
        return min(self.max, max(self.min, round(length)))


Lengths = Fixed | Uniform | Lognormal


def poisson(rate_rps: float, duration_s: float, random: Random) -> list[float]:
    """Arrival times in [0, duration_s), in seconds: gaps are exponential and independent."""
    times = []
    now_s = random.expovariate(rate_rps)
    while now_s < duration_s:
        times.append(now_s)
        now_s += random.expovariate(rate_rps)
    return times


def seeded(seed: int, *names: object) -> Random:
    """An own stream for each purpose: drawing more of one thing changes no other."""
    return Random("/".join(map(str, (seed, *names))))


def _order_problem(low: int, high: int) -> str | None:
    return f"min is {low}, max is {high}; allowed: min at most max" if low > high else None
