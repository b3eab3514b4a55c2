"""The engine's end of the line: answers questions, one JSON object a line, until it is told to end.

Standard library only: it runs inside every engine's own environment. Questions come on standard
input; answers go to what was standard output, while everything that libraries print there goes to
standard error, so that no banner is taken for an answer.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Setup:
    """What every engine is asked to be; pool_tokens: how many tokens its KV pool holds."""

    checkpoint: str
    dtype: str
    mode: str
    num_threads: int
    pool_tokens: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int


class Engine(ABC):
    """One loaded model. Prompts are token ids; nothing ends a sequence but its length.

    versions: of the packages that decide its speed. pool_bytes: of the KV pool as configured.
    """

    versions: dict[str, str]
    pool_bytes: int

    @abstractmethod
    def prefill(self, prompt: Sequence[int]) -> None:
        """Compute the prompt and draw one token, without any cached prefix."""

    @abstractmethod
    def decode(self, prompts: Sequence[Sequence[int]], warm_steps: int, steps: int) -> float:
        """Seconds that ``steps`` decode steps of all prompts together took, after the prompts
        were computed and ``warm_steps`` more steps were done. Each makes a token a prompt."""

    @abstractmethod
    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The greedy continuation."""

    def gaps(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float]:
        """How far each of ``tokens``, given those before it, lies below the best logit: 0 where
        it is the greedy choice. Only the engine that others are held against can say."""
        raise NotImplementedError

    def fill_pool(self) -> bool:
        """Write to all of the KV pool, so that it counts as resident. False: cannot."""
        return False


def answer(open_engine: Callable[[Setup], Engine]) -> None:
    """The main function of an engine process: returns when the asking side closes the line.

    It says that it is ready first, when all is imported and nothing is loaded.
    """
    _die_with_parent()
    questions = os.fdopen(os.dup(0), "r", encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    engine: Engine | None = None
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in questions:
        question = json.loads(line)
        try:
            if question["op"] == "open":
                began = time.perf_counter()
                engine = open_engine(Setup(**question["setup"]))
                found: dict[str, Any] = {
                    "load_s": time.perf_counter() - began,
                    "versions": engine.versions,
                    "pool_bytes": engine.pool_bytes,
                }
            else:
                assert engine is not None, "the first question must be open"
                found = measured(engine, question)
        except Exception as exc:
            # The line stays open: the asking side says what failed and goes on without this one.
            traceback.print_exc()
            found = {"error": f"{type(exc).__name__}: {exc}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def measured(engine: Engine, question: dict[str, Any]) -> dict[str, Any]:
    """prefill and decode: rounds ``[tokens, seconds]`` until ``window_s`` of timed work is done."""
    op = question["op"]
    if op == "greedy":
        return {"tokens": [engine.greedy(p, question["num_tokens"]) for p in question["prompts"]]}
    if op == "gaps":
        pairs = zip(question["prompts"], question["tokens"], strict=True)
        return {"gaps": [engine.gaps(prompt, tokens) for prompt, tokens in pairs]}
    if op == "fill_pool":
        return {"filled": engine.fill_pool()}
    rounds: list[tuple[int, float]] = []
    for batch in question["batches"]:
        if op == "prefill":
            began = time.perf_counter()
            engine.prefill(batch[0])
            rounds.append((len(batch[0]), time.perf_counter() - began))
        elif op == "decode":
            steps = question["steps"]
            seconds = engine.decode(batch, question["warm_steps"], steps)
            rounds.append((len(batch) * steps, seconds))
        else:
            raise ValueError(f"unknown question {op!r}")
        if sum(seconds for _, seconds in rounds) >= question["window_s"]:
            break
    return {"rounds": rounds}


def _die_with_parent() -> None:
    """A stopped process never sees its line close: the kernel ends it with its parent."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the asking process has ended")
