"""For how many steps a batch of decodes stays as it is. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from baton.engine.sequence import Sequence


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
