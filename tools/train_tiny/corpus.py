"""The text: which files, which of them are held out, and the tokenizer made from the rest."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
BEGIN_ID, END_ID, PAD_ID = 0, 1, 2
HELD_OUT_PERCENT = 2

_NOT_STANDARD_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__"})
_TESTS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    """``name``: path below the standard library's folder, with slashes on every system."""

    name: str
    text: str

    @property
    def held_out(self) -> bool:
        """Decided by the name alone, so that adding files moves none to the other side."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def standard_library(*, with_tests: bool) -> list[SourceFile]:
    """Its UTF-8 sources, in the order of their names."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = _NOT_STANDARD_LIBRARY if with_tests else _NOT_STANDARD_LIBRARY | _TESTS
    found = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root)
        if not left_out.intersection(relative.parts):
            try:
                found.append(SourceFile(relative.as_posix(), path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue  # a few sources declare another encoding: test data for the parser
    return sorted(found, key=lambda file: file.name)


def train_tokenizer(files: Sequence[SourceFile], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: any text round-trips, and the same files give the same vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((file.text for file in files), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[torch.Tensor]:
    """One int64 ``[num_tokens]`` per text: the begin token, its tokens, the end token."""
    return [
        torch.tensor([BEGIN_ID, *encoding.ids, END_ID])
        for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ]
