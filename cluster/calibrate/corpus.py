"""Text to calibrate on: files of folders, as token sequences of the checkpoint."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from baton.checkpoint.find import TOKENIZER_FILE
from baton.protocol.errors import ConfigError

SUFFIXES = (".py", ".md", ".rst", ".txt", ".json", ".jsonl", ".c", ".h", ".js", ".ts", ".html")
MIN_FILE_BYTES = 4_000
MAX_FILE_BYTES = 400_000
_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__")


def standard_library() -> Path:
    """Of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def token_sequences(
    folder: Path,
    sources: Sequence[Path],
    bos_token_id: int | None,
    min_tokens: int,
    max_tokens: int,
    wanted: int,
    seed: int,
) -> list[NDArray[np.int64]]:
    """Up to ``wanted`` beginnings of files in an order that ``seed`` decides, longest allowed
    first among those at hand. Raises ConfigError for a source that does not exist."""
    files = list(_files(sources))
    random.Random(seed).shuffle(files)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    found: list[NDArray[np.int64]] = []
    for path in files:
        if sum(len(t) == max_tokens for t in found) >= wanted:
            break
        text = path.read_text(encoding="utf-8", errors="replace")
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        first = [] if bos_token_id is None else [bos_token_id]
        tokens = np.array((first + ids)[:max_tokens], np.int64)
        if len(tokens) >= min_tokens:
            found.append(tokens)
    return sorted(found, key=len, reverse=True)[:wanted]


def _files(sources: Sequence[Path]) -> Iterator[Path]:
    for source in sources:
        if source.is_file():
            yield source
        elif source.is_dir():
            yield from (f for f in sorted(source.rglob("*")) if _is_text(f, source))
        else:
            raise ConfigError(f"--text {source}: no such file or folder", param="text")


def _is_text(path: Path, source: Path) -> bool:
    return (
        path.suffix in SUFFIXES
        and not any(part in _LEFT_OUT for part in path.relative_to(source).parts)
        and path.is_file()
        and MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES
    )
