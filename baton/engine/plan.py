"""What the scheduler asks of the executor, and what comes back. Pure data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from msgspec.structs import replace

from baton.protocol.sampling import SamplingParams, TokenLogprobs


class SequenceChunk(msgspec.Struct, frozen=True, gc=False, eq=False):
    """Run ``token_ids`` of one sequence at positions ``start .. start + len(token_ids) - 1``.

    block_table: block ids that cover positions 0 .. start + len(token_ids) - 1; KV of
      positions below ``start`` is already in them.
    samples: draw the next token from the last position's logits (the chunk ends the known
      tokens). Its position, which keys the draw, is ``start + len(token_ids)``.
    num_drafts: so many of ``token_ids``, at the end, are guesses. A token is drawn behind the
      last known one and behind each draft, as long as every draft so far is what was drawn
      in its place: 1 to ``num_drafts + 1`` tokens come of the chunk, and KV of the drafts that
      were wrong is overwritten later.
    prompt_ids, output_ids: all that the sequence has, for what looks back (penalties, bad
      words). ``output_ids`` is the sequence's own list, which grows when the step completes:
      read it during the step, keep no reference.
    num_prompt_logprobs: -1, or compute log-probabilities of the prompt tokens that this
      chunk's rows predict, and of so many alternatives.
    layer_start, num_layers: the layers to run these rows through (layered prefill); 0 layers
      stand for all. The rows' hidden states stay with the executor until the last layer is
      done; only then may ``samples`` be true.
    """

    seq_id: str
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    samples: bool
    sampling: SamplingParams
    prompt_ids: tuple[int, ...] = ()
    output_ids: Sequence[int] = ()
    num_prompt_logprobs: int = -1
    layer_start: int = 0
    num_layers: int = 0
    num_drafts: int = 0

    def __eq__(self, other: object) -> bool:
        """Of what is to be run; what looks back follows from it."""
        if not isinstance(other, SequenceChunk):
            return NotImplemented
        bare, bare_other = (replace(c, prompt_ids=(), output_ids=()) for c in (self, other))
        return msgspec.structs.astuple(bare) == msgspec.structs.astuple(bare_other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class BlockSwap:
    """Copy one KV block, all layers, between the device's pool and the host's."""

    block: int
    host_block: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward step. Chunks are packed without padding; a sequence occurs once.

    gone: sequences that ended or left since the step before; what is kept for them may go.
    swap_out, swap_in: copies to and from host memory, all of the former before any of the
      latter, and both before the forward pass: a block swapped out may be written by a chunk
      of this very step. A plan may consist of swaps alone.
    """

    step: int
    chunks: tuple[SequenceChunk, ...]
    gone: tuple[str, ...] = ()
    swap_out: tuple[BlockSwap, ...] = ()
    swap_in: tuple[BlockSwap, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    seq_id: str
    token_id: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """``logprobs`` of the prompt tokens at positions ``start``, ``start + 1``, ...; start >= 1."""

    seq_id: str
    start: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True, slots=True)
class FailedSequence:
    """A sequence that cannot go on. ``code``: of a BatonError.

    retryable: the fault lies in what was computed and not in the request. Whoever shares its KV
    may fail alike, and another worker may do better.
    """

    seq_id: str
    code: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came of a step.

    sampled: in the order of the plan's chunks that sample, several of a chunk with drafts.
    prompt_logprobs: of the chunks that asked for them and predict a prompt token. failed:
    sequences that cannot go on; what ``sampled`` has of them means nothing.
    compute_seconds: the forward pass; the copies of swaps are apart.
    """

    step: int
    sampled: tuple[SampledToken, ...]
    compute_seconds: float
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    swap_out_seconds: float = 0.0
    swap_in_seconds: float = 0.0
    failed: tuple[FailedSequence, ...] = ()
