"""Drawing behind drafts: the rows of a chunk, and which of their draws hold.

Every draw is a function of the logits and of (seed, position). Behind right drafts the logits are
those that one token at a time would have had, so the draws are too; behind a wrong one they are of
another text and are not looked at. Hence the output is the same with drafts and without, greedy
or sampled, whatever the drafts are: no draw is ever rejected that would have been made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baton.engine.plan import FailedSequence, SampledToken, SequenceChunk
from baton.engine.sampling.rows import SampleRow
from baton.protocol.errors import BatonError


def rows_of(chunk: SequenceChunk) -> list[SampleRow]:
    """One for the last known token, one for each draft, as if all before it were output."""
    num_known = len(chunk.token_ids) - chunk.num_drafts
    drafts = chunk.token_ids[num_known:]
    return [
        SampleRow(
            chunk.seq_id,
            chunk.sampling,
            chunk.start + num_known + count,
            chunk.prompt_ids,
            (*chunk.output_ids, *drafts[:count]) if count else chunk.output_ids,
            num_drafts=count,
        )
        for count in range(chunk.num_drafts + 1)
    ]


def kept_draws(
    chunks: Sequence[SequenceChunk],
    drawn: Sequence[SampledToken],
    errors: Mapping[int, BatonError],
) -> tuple[tuple[SampledToken, ...], tuple[FailedSequence, ...]]:
    """drawn: one per row of all chunks; errors: by row, why its draw means nothing."""
    kept: list[SampledToken] = []
    failed: list[FailedSequence] = []
    row = 0
    for chunk in chunks:
        drafts = chunk.token_ids[len(chunk.token_ids) - chunk.num_drafts :]
        for count in range(chunk.num_drafts + 1):
            error = errors.get(row + count)
            if error is not None:
                failed.append(
                    FailedSequence(chunk.seq_id, error.code, error.message, error.retryable)
                )
            token = drawn[row + count]
            kept.append(token)
            if error is not None or count == len(drafts) or token.token_id != drafts[count]:
                break
        row += chunk.num_drafts + 1
    return tuple(kept), tuple(failed)
