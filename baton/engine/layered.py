"""Layered prefill (arXiv 2510.08055): whole prompts through a group of layers a step. Pure.

Chunking cuts a prompt by tokens and reads every layer's weights once a chunk; here it is cut
by layers, so that each layer is read once for all its tokens: what pays where a layer is many
experts. Decodes run through all layers in every step, so either way a step has about the same
work. One batch of prompts is on its way at a time.
"""

from __future__ import annotations

from baton.engine.sequence import Sequence


class LayeredPrefill:
    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self._num_groups = 1
        self._group = 0
        self._counts: dict[str, int] = {}

    @property
    def is_under_way(self) -> bool:
        return bool(self._counts)

    def count(self, sequence: Sequence) -> int:
        """Tokens with which it is on its way; 0 when it is not."""
        return self._counts.get(sequence.seq_id, 0)

    def begin(self, prompts: list[tuple[Sequence, int]], budget: int) -> None:
        """In as many steps as make the work of each ``budget`` tokens through all layers."""
        assert not self._counts, "one batch at a time"
        self._counts = {sequence.seq_id: count for sequence, count in prompts}
        num_tokens = sum(self._counts.values())
        self._num_groups = max(1, min(self.num_layers, -(-num_tokens // max(1, budget))))
        self._group = 0

    @property
    def layers(self) -> tuple[int, int]:
        """(first, number) of this step's group. Groups differ by a layer at most."""
        first = self._group * self.num_layers // self._num_groups
        behind = (self._group + 1) * self.num_layers // self._num_groups
        return first, behind - first

    @property
    def is_last(self) -> bool:
        return self._group + 1 == self._num_groups

    def step_done(self) -> None:
        if self.is_under_way:
            self._group += 1
            if self._group == self._num_groups:
                self._counts = {}

    def left(self, sequence: Sequence) -> None:
        """It runs no more; the others go on. Idempotent."""
        self._counts.pop(sequence.seq_id, None)
