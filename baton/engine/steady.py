"""Many steps at once, of a batch of decodes that stays as it is. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Many

from baton.engine.admission import Admission
from baton.engine.booking import Booking
from baton.engine.plan import SampledToken
from baton.engine.residents import Residents
from baton.engine.sequence import NewToken, Sequence


class Steady:
    """As so many times packing and booking a step, to the last bit of state."""

    def __init__(
        self, max_num_batched_tokens: int, here: Residents, admission: Admission, booking: Booking
    ) -> None:
        self._budget = max_num_batched_tokens
        self._here = here
        self._admission = admission
        self._booking = booking

    def num_steps(self) -> int:
        """After how many steps, each of the same decodes, something else may happen."""
        batch = decode_batch(self._here.running, self._budget)
        is_let_in = self._admission.next_fits() if len(batch) < self._budget else None
        if is_let_in:
            return 0
        watches = self._here.cache is not None and is_let_in is False
        return steps_alike(batch, self._here.pool.block_size, until_full_block=watches)

    def advance(self, num_steps: int, tokens: Mapping[str, Many[int]]) -> list[NewToken]:
        """tokens: by sequence, what is drawn in each step; none of them may end it."""
        here, admission = self._here, self._admission
        batch = decode_batch(here.running, self._budget)
        if len(batch) < self._budget and admission.next_fits() is False:
            admission.num_blocked += num_steps
        size = here.pool.block_size
        full: list[tuple[int, int, int]] = []
        news: list[list[NewToken]] = [[] for _ in range(num_steps)]
        for place, sequence in enumerate(batch):
            start = sequence.num_computed
            for step, token_id in enumerate(tokens[sequence.seq_id][:num_steps]):
                new = self._booking.append(sequence, SampledToken(sequence.seq_id, token_id))
                assert not new.finish_reason, f"token {token_id} ends {sequence.seq_id}"
                news[step].append(new)
            behind = sequence.num_computed = start + num_steps
            sequence.num_chunks += num_steps
            borders = range(start - start % size + size, behind + 1, size)
            full += [(border - start, place, border) for border in borders]
        # Of two blocks that hold the same, the one that was full first is found.
        for _, place, border in sorted(full):
            here.name_blocks(batch[place], border)
        here.gone = []
        return [new for step in news for new in step]


def decode_batch(running: Iterable[Sequence], budget: int) -> list[Sequence]:
    """Whom the next step runs when it is decodes alone; empty when it is not."""
    batch: list[Sequence] = []
    for sequence in running:
        if sequence.num_tokens - sequence.num_computed > 1:
            return []
        if len(batch) < budget:
            batch.append(sequence)
    return batch


def steps_alike(batch: Iterable[Sequence], block_size: int, *, until_full_block: bool) -> int:
    """Steps after each of which the same batch runs again without another block.

    until_full_block: what becomes full may be found by a waiting sequence, so stop there.
    Tokens that end a sequence early are the caller's to know of.
    """
    steps = []
    for sequence in batch:
        steps.append(len(sequence.block_table) * block_size - sequence.num_computed)
        steps.append(sequence.sampling.max_tokens - len(sequence.output_ids) - 1)
        if until_full_block:
            steps.append(block_size - sequence.num_computed % block_size)
    return max(0, min(steps, default=0))
