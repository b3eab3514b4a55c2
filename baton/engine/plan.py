"""What the scheduler asks of the executor, and what comes back. Pure data."""

from __future__ import annotations

from dataclasses import dataclass

from baton.protocol.sampling import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Run ``token_ids`` of one sequence at positions ``start .. start + len(token_ids) - 1``.

    block_table: block ids that cover positions 0 .. start + len(token_ids) - 1; KV of
      positions below ``start`` is already in them.
    samples: draw the next token from the last position's logits (the chunk ends the known
      tokens). Its position, which keys the draw, is ``start + len(token_ids)``.
    """

    seq_id: str
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    samples: bool
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward step. Chunks are packed without padding; a sequence occurs once."""

    step: int
    chunks: tuple[SequenceChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    seq_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """``sampled`` in the order of the plan's chunks that sample."""

    step: int
    sampled: tuple[SampledToken, ...]
    compute_seconds: float
