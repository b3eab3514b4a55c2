"""What a step's result changes: tokens said, KV computed, sequences that end. Pure."""

from __future__ import annotations

from baton.engine.layered import LayeredPrefill
from baton.engine.plan import SampledToken, SequenceChunk, StepPlan, StepResult
from baton.engine.residents import Residents
from baton.engine.sequence import FinishReason, NewToken, Sequence, finish
from baton.engine.speculation import Speculator


class Booking:
    """layered, speculator: those that planned the steps, if any."""

    def __init__(
        self,
        here: Residents,
        layered: LayeredPrefill | None,
        speculator: Speculator | None,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._here = here
        self._layered = layered
        self._speculator = speculator
        self._eos_token_ids = eos_token_ids

    def book(self, plan: StepPlan, batch: list[Sequence], result: StepResult) -> list[NewToken]:
        """batch: the sequences of the plan's chunks. Those that finished are gone, and those
        dropped meanwhile; their blocks are free."""
        here = self._here
        for part in result.prompt_logprobs:
            found = here.sequences[part.seq_id].prompt_logprobs
            assert found is not None
            found[part.start - 1 :] = part.logprobs
        drawn = {token.seq_id: token for token in reversed(result.sampled)}
        behind_drafts: dict[str, list[SampledToken]] = {}
        if len(drawn) < len(result.sampled):
            for token in result.sampled:
                behind_drafts.setdefault(token.seq_id, []).append(token)
        ends = self._layered is None or self._layered.is_last
        size = here.pool.block_size
        news: list[NewToken] = []
        for chunk, sequence in zip(plan.chunks, batch, strict=True):
            if sequence.is_dropped:
                here.remove(sequence)
                here.free(sequence)
                continue
            if chunk.num_layers and not ends:
                continue
            num_known = chunk.start + len(chunk.token_ids) - chunk.num_drafts
            sequence.num_computed = num_known
            sequence.num_chunks += 1
            if num_known // size > sequence.num_named:
                here.name_blocks(sequence, num_known)
            if chunk.samples:
                first = drawn[chunk.seq_id]
                if chunk.num_drafts:
                    tokens = behind_drafts.get(chunk.seq_id, [first])
                    news += self._verified(sequence, chunk, tokens)
                else:
                    news.append(self.append(sequence, first))
        if self._layered is not None:
            self._layered.step_done()
        return news

    def _verified(
        self, sequence: Sequence, chunk: SequenceChunk, tokens: list[SampledToken]
    ) -> list[NewToken]:
        """Each token but the last was drafted, so its KV is there once it is output."""
        if self._speculator is not None:
            self._speculator.verified(chunk, len(tokens))
        news = [self.append(sequence, tokens[0])]
        for token in tokens[1:]:
            if news[-1].finish_reason:
                break
            sequence.num_computed += 1
            self._here.name_blocks(sequence, sequence.num_computed)
            news.append(self.append(sequence, token))
        return news

    def append(self, sequence: Sequence, drawn: SampledToken) -> NewToken:
        """It says one token more, and leaves if that was its last."""
        token_id, outputs, sampling = drawn.token_id, sequence.output_ids, sequence.sampling
        outputs.append(token_id)
        reason: FinishReason = ""
        stop_token_id = -1
        # Nearly no token ends anything: ask first what ``finish`` would look at.
        if (
            len(outputs) >= sampling.max_tokens
            or token_id in self._eos_token_ids
            or token_id in sampling.stop_token_ids
        ):
            reason, stop_token_id = finish(sequence, token_id, self._eos_token_ids)
            if reason:
                self._here.remove(sequence)
                self._here.free(sequence)
        place, logprobs = len(outputs) - 1, drawn.logprobs
        if sequence.prompt_logprobs is None:
            return NewToken(sequence, token_id, logprobs, reason, stop_token_id, (), place)
        of_prompt, sequence.prompt_logprobs = tuple(sequence.prompt_logprobs), None
        return NewToken(sequence, token_id, logprobs, reason, stop_token_id, of_prompt, place)
