"""Prompts of given lengths, cut from Python source text, as token ids of the served model."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from random import Random

import baton
from baton.protocol.errors import ConfigError

CORPUS_CHARS = 200_000
PIECE_CHARS = 2_000
PREFIX_ROOM = 16
"""Tokens of a piece that a tokenizer may add of its own."""
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests"})


class PromptCutter:
    """Prompts begin at random places, so that no two share a first block by design.

    prefix: what the tokenizer puts before every text (a begin token, or nothing).
    """

    def __init__(self, prefix: tuple[int, ...], corpus_ids: list[int]) -> None:
        self._prefix = prefix
        self._corpus_ids = corpus_ids

    def cut(self, num_tokens: int, random: Random) -> tuple[int, ...]:
        """Exactly ``num_tokens`` ids. Raises ConfigError when the text is shorter than that."""
        num_text_ids = max(0, num_tokens - len(self._prefix))
        if num_text_ids > len(self._corpus_ids):
            raise ConfigError(
                f"prompt_tokens asks for {num_tokens} tokens; the text for prompts has "
                f"{len(self._corpus_ids)}"
            )
        start = random.randrange(len(self._corpus_ids) - num_text_ids + 1)
        text_ids = self._corpus_ids[start : start + num_text_ids]
        return (*self._prefix, *text_ids)[:num_tokens]


async def load_cutter(
    client: baton.AsyncClient, max_model_len: int, random: Random
) -> PromptCutter:
    """Tokenised by the deployment itself, so that any model can be asked."""
    one, other = await client.tokenize("a"), await client.tokenize("1")
    prefix = one[: next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)]
    ids: list[int] = []
    # Text without accents has at most one token a character.
    piece_chars = max(1, min(PIECE_CHARS, max_model_len - PREFIX_ROOM))
    for piece in _pieces(source_text(random), piece_chars):
        ids.extend((await client.tokenize(piece))[len(prefix) :])
    return PromptCutter(tuple(prefix), ids)


def source_text(random: Random) -> str:
    """``CORPUS_CHARS`` ASCII characters of the standard library: files in random order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path for path in root.rglob("*.py") if not _LEFT_OUT.intersection(path.parts[:-1])
    )
    random.shuffle(paths)
    parts: list[str] = []
    num_chars = 0
    for path in paths:
        if num_chars >= CORPUS_CHARS:
            break
        source = path.read_bytes()
        if source.isascii():
            parts.append(source.decode("ascii"))
            num_chars += len(source)
    return "\n".join(parts)[:CORPUS_CHARS]


def _pieces(text: str, num_chars: int) -> list[str]:
    return [text[start : start + num_chars] for start in range(0, len(text), num_chars)]
