"""Prompts from Python source: deterministic by seed, of any length in tokens."""

from __future__ import annotations

import argparse
import inspect
import random
from functools import cache

from baton.checkpoint.find import resolve
from router.tokenizer import Tokenizer


@cache
def _source_ids() -> tuple[int, ...]:
    tokenizer = Tokenizer.load(resolve("baton-tiny"))
    return tuple(tokenizer.encode(inspect.getsource(argparse)))


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """The begin token and a slice of a standard module's source."""
    source = _source_ids()
    start = random.Random(seed).randrange(1, len(source) - num_tokens)
    return [0, *source[start : start + num_tokens - 1]]
