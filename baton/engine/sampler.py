"""Draws one token per row of logits by the row's own parameters.

Owns what is kept per sequence between steps: counts of seen tokens and parameters made ready.
It can be lost at any time and is built again from prompt and output, so a sequence continues
elsewhere, or after a preemption, with the same tokens. No row looks at another row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from baton.engine.plan import SampledToken
from baton.engine.sampling.apply import Ruled, apply_rules
from baton.engine.sampling.draw import draw_tokens
from baton.engine.sampling.kernel_draw import Draw
from baton.engine.sampling.logprobs import token_logprobs
from baton.engine.sampling.rows import SampleRow
from baton.engine.sampling.rules import SequenceRules, has_rules
from baton.engine.structured.masks import RowMasks
from baton.protocol.sampling import TokenLogprobs

MAX_KEPT_SEQUENCES = 4_096
"""Beyond it the state that was used least recently goes."""


class Sampler:
    def __init__(self, eos_token_ids: Sequence[int], draw: Draw = draw_tokens) -> None:
        """draw: for the device that the logits are on."""
        self._eos_token_ids = tuple(eos_token_ids)
        self._draw = draw
        self._kept: dict[str, SequenceRules] = {}
        """By sequence id, the one used last at the end."""

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def forget(self, seq_ids: Iterable[str]) -> None:
        for seq_id in seq_ids:
            self._kept.pop(seq_id, None)

    def sample(
        self, logits: Tensor, rows: Sequence[SampleRow], masks: RowMasks | None = None
    ) -> tuple[SampledToken, ...]:
        """One token per row, in order. The same call again gives the same tokens.

        logits: ``[S, V]`` float32, finite, contiguous; changed in place. masks: of the rows
        whose output is structured; ``masks.errors`` tells afterwards which draws are void.
        """
        params = [row.params for row in rows]
        asked = [i for i, p in enumerate(params) if p.num_logprobs >= 0]
        plain = logits[asked].log_softmax(dim=-1) if asked else None
        ruled = self._ruled(rows)
        if ruled:
            apply_rules(logits, ruled)
        if masks is not None:
            masks.apply(logits)
        token_ids = self._draw(logits, params, [row.position for row in rows])
        found: dict[int, TokenLogprobs] = {}
        if plain is not None:
            num_best = [params[i].num_logprobs for i in asked]
            found = dict(zip(asked, token_logprobs(plain, token_ids[asked], num_best), strict=True))
        return tuple(
            SampledToken(row.seq_id, token_id, found.get(i))
            for i, (row, token_id) in enumerate(zip(rows, token_ids.tolist(), strict=True))
        )

    def _ruled(self, rows: Sequence[SampleRow]) -> list[Ruled]:
        ruled: list[Ruled] = []
        for index, row in enumerate(rows):
            if not has_rules(row.params):
                continue
            rules = self._kept.pop(row.seq_id, None)
            if rules is None or not rules.fits(row):
                rules = SequenceRules(row, self._eos_token_ids)
            rules.count(row.output_ids)
            self._kept[row.seq_id] = rules
            ruled.append((index, row.params, row.output_ids, rules))
        while len(self._kept) > MAX_KEPT_SEQUENCES:
            del self._kept[next(iter(self._kept))]
        return ruled
