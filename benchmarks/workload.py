"""The workload file: what is sent, how often, and which limits count. TOML, see workloads/."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from baton.protocol.errors import ConfigError
from baton.protocol.slo import Slo
from benchmarks.arrivals import Lengths, PositiveFloat, PositiveInt

NonNegativeFloat = Annotated[float, Meta(ge=0.0)]


class _Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class SloLimits(_Table, frozen=True):
    ttft_ms: PositiveFloat
    tpot_ms: PositiveFloat


class Schedule(_Table, frozen=True):
    """One segment is one deployment under one rate: warm-up, window, cool-down.

    Requests that arrive in the window are measured, each until its end. Requests of the
    warm-up and the cool-down are load and nothing else.
    """

    rates_rps: Annotated[tuple[PositiveFloat, ...], Meta(min_length=1, max_length=32)]
    repeats: PositiveInt = 2
    """Rounds over all deployments; each has its own arrivals, alike for every deployment."""
    warmup_s: NonNegativeFloat = 2.0
    window_s: PositiveFloat = 10.0
    cooldown_s: NonNegativeFloat = 1.0
    request_timeout_s: PositiveFloat = 30.0


class Gate(_Table, frozen=True):
    """The correctness check before anything is measured; all prompts run at once."""

    prompts: PositiveInt = 8
    output_tokens: PositiveInt = 32
    near_tie_logprob: PositiveFloat = 1e-3
    """A difference where the two best tokens are closer than this is counted, not refused."""


class Workload(_Table, frozen=True):
    name: Annotated[str, Meta(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    seed: int
    prompt_tokens: Lengths
    output_tokens: Lengths
    schedule: Schedule
    slo: SloLimits
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    gate: Gate = Gate()

    @property
    def limits(self) -> Slo:
        return Slo(self.slo.ttft_ms, self.slo.tpot_ms)

    @property
    def longest_tokens(self) -> int:
        """Prompt and answer together, at the most."""
        return self.prompt_tokens.most + max(self.output_tokens.most, self.gate.output_tokens)


def load_workload(path: Path) -> Workload:
    """Raises ConfigError that names the file, the key and what is allowed."""
    try:
        with path.open("rb") as stream:
            data = tomllib.load(stream)
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not TOML: {exc}") from exc
    try:
        workload = msgspec.convert(data, Workload)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    for key in ("prompt_tokens", "output_tokens"):
        problem = getattr(workload, key).problem()
        if problem is not None:
            raise ConfigError(f"{path}: {key}: {problem}", param=key)
    return workload
