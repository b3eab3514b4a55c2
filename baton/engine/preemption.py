"""What a preempted sequence costs to bring back: computed again, or copied out and in. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.plan import StepPlan, StepResult

WEIGHT = 0.2
"""Of the newest measurement in each running mean."""


@dataclass(frozen=True, slots=True)
class EngineRates:
    """As measured on this machine; 0 is unknown."""

    prefill_seconds_per_token: float = 0.0
    swap_out_bytes_per_second: float = 0.0
    swap_in_bytes_per_second: float = 0.0


def recompute_seconds(num_tokens: int, rates: EngineRates) -> float:
    return num_tokens * rates.prefill_seconds_per_token


def swap_seconds(num_bytes: int, rates: EngineRates) -> float:
    """Out and in again."""
    return num_bytes / rates.swap_out_bytes_per_second + num_bytes / rates.swap_in_bytes_per_second


def swap_is_cheaper(num_tokens: int, num_bytes: int, rates: EngineRates) -> bool:
    """num_tokens: to be computed again; num_bytes: of KV to copy each way. What was never
    measured is not chosen, and recomputing is measured by doing it."""
    if not (
        rates.prefill_seconds_per_token
        and rates.swap_out_bytes_per_second
        and rates.swap_in_bytes_per_second
    ):
        return False
    return swap_seconds(num_bytes, rates) < recompute_seconds(num_tokens, rates)


class RateMeter:
    """Keeps ``EngineRates`` up to date from the steps that a worker runs. block_bytes: of one KV
    block, all layers; num_layers: of the model."""

    def __init__(self, rates: EngineRates, block_bytes: int, num_layers: int = 1) -> None:
        self.rates = rates
        self._block_bytes = block_bytes
        self._num_layers = num_layers

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        """Only steps that are mostly prefill say what prefill costs."""
        rates = self.rates
        num_chunks = len(plan.chunks)
        num_tokens = self._whole_tokens(plan)
        prefill = rates.prefill_seconds_per_token
        if num_tokens >= 2 * num_chunks > 0 and result.compute_seconds > 0:
            prefill = _mean(prefill, result.compute_seconds / num_tokens)
        self.rates = EngineRates(
            prefill,
            self._copied(rates.swap_out_bytes_per_second, plan.swap_out, result.swap_out_seconds),
            self._copied(rates.swap_in_bytes_per_second, plan.swap_in, result.swap_in_seconds),
        )

    def _whole_tokens(self, plan: StepPlan) -> float:
        """A token that runs through some of the layers counts for their share of all."""
        all_layers = self._num_layers
        passes = sum(
            (len(c.token_ids) - c.num_drafts) * (c.num_layers or all_layers) for c in plan.chunks
        )
        return passes / all_layers

    def _copied(self, rate: float, swaps: tuple[object, ...], seconds: float) -> float:
        if not swaps or seconds <= 0:
            return rate
        return _mean(rate, len(swaps) * self._block_bytes / seconds)


def _mean(so_far: float, newest: float) -> float:
    return newest if so_far == 0 else (1 - WEIGHT) * so_far + WEIGHT * newest
