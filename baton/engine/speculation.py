"""Which decodes of a step get drafts, and how long: from load and measured acceptance. Pure.

A draft rides behind a sequence's last token in one chunk. The executor draws at every one of
these positions, with the generator keyed by (seed, position), and keeps draws as long as each
equals the draft behind it: what it keeps is what it would have drawn token by token, so the
output is the same with and without drafts, greedy or sampled (see ``Executor``).

How long: a step of n sequences with d drafts each takes ``1 + n / 7 + n * (1 + d) / 12`` units of
time, and when each draft is right with probability a, brings ``1 + a + ... + a**d`` tokens a
sequence. The d that brings the most tokens per unit of time is taken; where nothing is guessed
well, or the batch is large, that is 0.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from functools import lru_cache

from msgspec.structs import replace

from baton.engine.lookups import Lookups
from baton.engine.plan import SequenceChunk
from baton.engine.prompt_lookup import PromptLookup
from baton.engine.sequence import Sequence
from baton.protocol.sampling import SamplingParams

MAX_DRAFT_TOKENS = 8
SEQUENCES_OF_ONE_STEP, ROWS_OF_ONE_STEP = 7.0, 12.0
"""So many sequences (their contexts), or rows, cost as much as reading the weights once. Measured
on one core with baton-tiny; on a GPU rows are cheaper, so these lengths are on the safe side."""
MAX_DRAFTED_SEQUENCES = 128
"""In a larger batch nobody has drafts: it is busy, and guessing would make scheduling late."""
MAX_ACCEPTANCE = 0.95
FORGETTING = 0.9
"""What a verified draft leaves of the weight of older ones."""
RECOVERY = 0.99
"""What each step without a draft leaves: a sequence that was guessed badly gets another try."""


@lru_cache(maxsize=4_096)
def draft_length(num_sequences: int, acceptance: float) -> int:
    """The best one for each of ``num_sequences`` that are guessed equally well."""
    if num_sequences > MAX_DRAFTED_SEQUENCES:
        return 0
    acceptance = min(acceptance, MAX_ACCEPTANCE)
    fixed = 1.0 + num_sequences / SEQUENCES_OF_ONE_STEP
    best, best_rate = 0, 0.0
    tokens, gain = 0.0, 1.0
    for length in range(MAX_DRAFT_TOKENS + 1):
        tokens += gain
        gain *= acceptance
        rate = tokens / (fixed + num_sequences * (1 + length) / ROWS_OF_ONE_STEP)
        if rate > best_rate:
            best, best_rate = length, rate
    return best


def can_be_drafted(sampling: SamplingParams) -> bool:
    """Penalties count the tokens before each draw, which drafts are not yet."""
    return (
        sampling.repetition_penalty == 1
        and sampling.presence_penalty == 0
        and sampling.frequency_penalty == 0
    )


@dataclass(slots=True)
class _Record:
    """How one sequence's drafts have fared lately, from a prior of one half."""

    num_drafted: float = 0.0
    num_accepted: float = 0.0

    @property
    def acceptance(self) -> float:
        """Rounded, so that few values of it occur."""
        return round((self.num_accepted + 1.0) / (self.num_drafted + 2.0), 2)

    def fade(self, factor: float) -> None:
        self.num_drafted *= factor
        self.num_accepted *= factor


class Speculator:
    """Counts rise from the start. What is kept of a sequence can be lost: it is built again."""

    def __init__(self, block_size: int, eos_token_ids: frozenset[int]) -> None:
        self._block_size = block_size
        self._eos_token_ids = eos_token_ids
        self._lookups = Lookups()
        self._records: dict[str, _Record] = {}
        self.num_drafted = 0
        self.num_accepted = 0

    @property
    def num_kept(self) -> int:
        return max(len(self._lookups), len(self._records))

    def forget(self, seq_id: str) -> None:
        self._lookups.forget(seq_id)
        self._records.pop(seq_id, None)

    def extend(
        self,
        chunks: list[SequenceChunk],
        batch: Many[Sequence],
        max_num_batched_tokens: int,
        spare_block: Callable[[Sequence], bool],
    ) -> None:
        """Put drafts behind decodes, in place, as far as the token budget goes.

        batch: the sequences of ``chunks``. spare_block: gives a sequence a block if that costs
        nobody anything.
        """
        if draft_length(len(chunks), MAX_ACCEPTANCE) == 0:
            return
        num_free_tokens = max_num_batched_tokens - sum(len(c.token_ids) for c in chunks)
        decodes = [
            place
            for place, chunk in enumerate(chunks)
            if chunk.samples and len(chunk.token_ids) == 1 and can_be_drafted(chunk.sampling)
        ]
        self._lookups.begin_step()
        for place in decodes:
            sequence = batch[place]
            lookup = self._lookups.up_to_date(sequence)
            if lookup is None:
                continue
            record = self._records.setdefault(sequence.seq_id, _Record())
            length = draft_length(len(chunks), record.acceptance)
            draft = self._draft(lookup, sequence, min(length, num_free_tokens), spare_block)
            if draft:
                chunk = chunks[place]
                token_ids = (*chunk.token_ids, *draft)
                table = self._table(sequence, chunk.start + len(token_ids))
                chunks[place] = replace(
                    chunk, token_ids=token_ids, block_table=table, num_drafts=len(draft)
                )
                num_free_tokens -= len(draft)
            else:
                record.fade(RECOVERY)

    def verified(self, chunk: SequenceChunk, num_drawn: int) -> None:
        """``num_drawn`` tokens came of a chunk: one more than drafts that were right."""
        self.num_drafted += chunk.num_drafts
        self.num_accepted += num_drawn - 1
        record = self._records.get(chunk.seq_id)
        if record is not None:
            record.fade(FORGETTING)
            # Behind the first wrong one nothing was tried.
            record.num_drafted += min(num_drawn, chunk.num_drafts)
            record.num_accepted += num_drawn - 1

    def _draft(
        self,
        lookup: PromptLookup,
        sequence: Sequence,
        count: int,
        spare_block: Callable[[Sequence], bool],
    ) -> list[int]:
        sampling = sequence.sampling
        count = min(count, sampling.max_tokens - len(sequence.output_ids) - 1)
        draft = lookup.propose(count) if count > 0 else []
        # Nothing is drawn behind an end, so nothing is guessed from there on.
        for place, token_id in enumerate(draft):
            if token_id in sampling.stop_token_ids or token_id in self._eos_token_ids:
                del draft[place:]
                break
        room = len(sequence.block_table) * self._block_size - sequence.num_tokens
        if len(draft) > room and spare_block(sequence):
            room += self._block_size
        return draft[:room]

    def _table(self, sequence: Sequence, num_tokens: int) -> tuple[int, ...]:
        return sequence.block_table[: -(-num_tokens // self._block_size)]
