"""transformers' ``generate`` as an engine process; mode: which cache it is told to use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList

from benchmarks.engine.answer import Engine, Setup, answer


class Transformers(Engine):
    pool_bytes = 0

    def __init__(self, setup: Setup) -> None:
        torch.set_num_threads(setup.num_threads)
        dtype = getattr(torch, setup.dtype)
        self._model: Any = AutoModelForCausalLM.from_pretrained(setup.checkpoint, dtype=dtype)
        self._model.generation_config.eos_token_id = None
        self._cache = {"static": "static", "dynamic": None}[setup.mode]
        self.versions = {name: version(name) for name in ("transformers", "torch")}

    def prefill(self, prompt: Sequence[int]) -> None:
        self._generate([prompt], 1, [])

    def decode(self, prompts: Sequence[Sequence[int]], warm_steps: int, steps: int) -> float:
        times: list[float] = []
        self._generate(prompts, 1 + warm_steps + steps, times)
        return times[warm_steps + steps] - times[warm_steps]

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        return self._generate([prompt], num_tokens, [])

    @torch.inference_mode()
    def gaps(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        logits = self._model(torch.tensor([[*prompt, *tokens]])).logits[0].float()
        logits = logits[len(prompt) - 1 : -1]
        chosen = logits.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
        found: list[float] = (logits.amax(dim=-1) - chosen).tolist()
        return found

    def _generate(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, times: list[float]
    ) -> list[int]:
        """The tokens of the first prompt; ``times`` gets when each step's logits were there."""
        ids = torch.tensor([list(p) for p in prompts])
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=self._cache,
            logits_processor=LogitsProcessorList([_Clock(times)]),
        )
        made: list[int] = out[0, ids.shape[1] :].tolist()
        return made


class _Clock(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, times: list[float]) -> None:
        self._times = times

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._times.append(time.perf_counter())
        return scores


if __name__ == "__main__":
    answer(Transformers)
