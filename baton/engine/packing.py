"""Which tokens of which sequences a step runs: fills the token budget. Pure.

Sequences that run one token come first, so a prompt's chunks never stall a decode
(Sarathi-Serve, section 4); what is left of the budget goes to prompts, to the last token.
"""

from __future__ import annotations

from baton.engine.admission import Admission
from baton.engine.layered import LayeredPrefill
from baton.engine.plan import SequenceChunk
from baton.engine.residents import Residents
from baton.engine.sequence import Sequence
from baton.engine.speculation import Speculator


class Packing:
    """layered: given in that prefill mode. speculator: given where drafts are wanted."""

    def __init__(
        self,
        max_num_batched_tokens: int,
        here: Residents,
        admission: Admission,
        layered: LayeredPrefill | None,
        speculator: Speculator | None,
    ) -> None:
        self._budget = max_num_batched_tokens
        self._here = here
        self._running = here.running
        self._pool = here.pool
        self._admission = admission
        self._layered = layered
        self._speculator = speculator
        self._batch: list[Sequence] = []

    def pack(self) -> tuple[list[SequenceChunk], list[Sequence]]:
        """The chunks of the next step and, in the same order, their sequences."""
        num_preempted = self._here.num_preemptions
        batch: list[Sequence] = []
        self._batch = batch
        chunks, prompts = self._decodes(self._budget)
        left = self._budget - len(chunks)
        # What a preemption freed is for those that run.
        admits = self._here.num_preemptions == num_preempted
        if self._layered is None:
            chosen = self._prompts(prompts, left, admits)
            chunks += [self._chunk(sequence, count) for sequence, count in chosen]
        else:
            chunks += self._layer_group(self._layered, prompts, left, admits)
        if self._speculator is not None:
            self._speculator.extend(chunks, batch, self._budget, self._spare_block)
        return chunks, batch

    def _decodes(self, budget: int) -> tuple[list[SequenceChunk], list[Sequence]]:
        """A chunk for each sequence that runs one token; those that have more to run."""
        size, batch = self._pool.block_size, self._batch
        chunks: list[SequenceChunk] = []
        prompts: list[Sequence] = []
        for sequence in self._running.in_order():
            start, prompt_ids, outputs = (
                sequence.num_computed,
                sequence.prompt_ids,
                sequence.output_ids,
            )
            if len(prompt_ids) + len(outputs) - start > 1:
                prompts.append(sequence)
                continue
            table = sequence.block_table
            # One that was preempted a moment ago has no blocks.
            if not table or len(chunks) == budget:
                continue
            needed = start // size + 1
            if len(table) != needed:
                if len(table) > needed:
                    table = table[:needed]
                elif self._here.grow(sequence):
                    table = sequence.block_table
                else:
                    continue
            batch.append(sequence)
            chunks.append(
                SequenceChunk(
                    sequence.seq_id,
                    (outputs[-1],) if outputs else prompt_ids[-1:],
                    start,
                    table,
                    True,
                    sequence.sampling,
                    prompt_ids,
                    outputs,
                )
            )
        return chunks, prompts

    def _prompts(
        self, prompts: list[Sequence], budget: int, admits: bool, single_cost: int = 1
    ) -> list[tuple[Sequence, int]]:
        """Who runs how many tokens of the rest of the budget: those that have begun, then new
        ones. single_cost: of running one token and no more."""
        chosen = []
        for sequence in prompts:
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            cost = single_cost if count == 1 else count
            if sequence.block_table and 0 < cost <= budget:
                chosen.append((sequence, count))
                budget -= cost
        return chosen + self._admission.admit(budget, single_cost) if admits else chosen

    def _layer_group(
        self, layered: LayeredPrefill, prompts: list[Sequence], budget: int, admits: bool
    ) -> list[SequenceChunk]:
        """The next group of layers of the prompts on their way, or the first of a new batch."""
        alone = []
        if layered.is_under_way:
            chosen = [(s, layered.count(s)) for s in prompts if layered.count(s)]
        else:
            # One token is not worth spreading over steps: it takes all layers of this one.
            depth = layered.num_layers
            both = self._prompts(prompts, budget * depth, admits, single_cost=depth)
            alone = [self._chunk(s, n) for s, n in both if n == 1]
            chosen = [(s, n) for s, n in both if n > 1]
            layered.begin(chosen, budget - len(alone))
        return alone + [self._chunk(s, n, layered) for s, n in chosen]

    def _chunk(
        self, sequence: Sequence, count: int, layered: LayeredPrefill | None = None
    ) -> SequenceChunk:
        start = sequence.num_computed
        stop = start + count
        ends = layered is None or layered.is_last
        layer_start, num_layers = (0, 0) if layered is None else layered.layers
        asks = ends and sequence.prompt_logprobs is not None
        asks = asks and start + 1 < len(sequence.prompt_ids)
        self._batch.append(sequence)
        return SequenceChunk(
            seq_id=sequence.seq_id,
            token_ids=sequence.tokens(start, stop),
            start=start,
            block_table=sequence.block_table[: self._pool.blocks_for(stop)],
            samples=ends and stop == sequence.num_tokens,
            sampling=sequence.sampling,
            prompt_ids=sequence.prompt_ids,
            output_ids=sequence.output_ids,
            num_prompt_logprobs=sequence.sampling.num_prompt_logprobs if asks else -1,
            layer_start=layer_start,
            num_layers=num_layers,
        )

    def _spare_block(self, sequence: Sequence) -> bool:
        """One more block for its drafts, of those that nobody will need soon."""
        if self._pool.num_free <= max(self._admission.watermark_blocks, len(self._running)):
            return False
        sequence.block_table += tuple(self._pool.allocate(sequence.seq_id, 1))
        return True
