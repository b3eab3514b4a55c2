"""A tokenizer.json of one token per byte, and EOS: enough for any text, and as small as that."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

EOS_ID = 256
VOCAB_SIZE = 264
"""A few columns of the logits stand for no token, as in many checkpoints."""


def write_byte_tokenizer(folder: Path) -> Path:
    """Id i is byte i."""
    alphabet = {byte: char for char, byte in _bytes_of_chars().items()}
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={alphabet[byte]: byte for byte in range(256)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>"])
    path = folder / "tokenizer.json"
    inner.save(str(path))
    assert json.loads(path.read_text())["model"]["vocab"][alphabet[65]] == 65
    return path


def _bytes_of_chars() -> dict[str, int]:
    """Printable bytes stand for themselves, the rest for characters from 256 on (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def text_of(token_ids: list[int]) -> str:
    """Raises UnicodeDecodeError where the bytes are no text."""
    return bytes(i for i in token_ids if i < 256).decode()
