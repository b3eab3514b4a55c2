"""Text to token ids and back, as the checkpoint's own tokenizer.json says.

Beginning-of-sequence: the post-processor in tokenizer.json decides, as in every other
server. Where it adds nothing and tokenizer_config.json says ``"add_bos_token": true``
the id is put in front here; baton-tiny is such a checkpoint (it was trained with
``<|begin|>`` before each file, its tokenizer.json has no post-processor). Rendered chat
prompts are encoded without it: the template writes its special tokens itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from baton.protocol.errors import ConfigError

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Texts that a chat template may write; empty where the checkpoint names none."""

    bos: str = ""
    eos: str = ""


class Tokenizer:
    """Safe to use from several threads: nothing changes after construction."""

    def __init__(self, inner: tokenizers.Tokenizer, *, bos_id: int | None = None) -> None:
        """``bos_id``: put before every text that is encoded with special tokens."""
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._bos_id = bos_id
        self._texts: dict[int, str] = {}
        """Of single tokens, as far as anybody asked: no more than the vocabulary."""
        self._special_ids = frozenset(
            token_id
            for token_id, token in inner.get_added_tokens_decoder().items()
            if token.special
        )
        vocabulary = inner.get_vocab(with_added_tokens=True)
        self._byte_ids = frozenset(
            token_id for token, token_id in vocabulary.items() if _BYTE_TOKEN.fullmatch(token)
        )
        self._max_token_chars = max(map(len, vocabulary), default=1)
        self._vocab_size = max(vocabulary.values(), default=-1) + 1

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Raises ConfigError when tokenizer.json is missing or is not one."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(
                f"{path} is missing: the router tokenises with it. Copy tokenizer.json into "
                "the model folder (transformers writes it with save_pretrained)",
                param="model.path",
            )
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as exc:  # the library raises no narrower type
            raise ConfigError(
                f"{path} is not a tokenizer: {str(exc)[:300]}", param="model.path"
            ) from exc
        return cls(inner, bos_id=_bos_id_to_add(inner, read_tokenizer_config(folder)))

    @property
    def vocab_size(self) -> int:
        """One more than the highest id, added tokens included."""
        return self._vocab_size

    @property
    def max_token_chars(self) -> int:
        """No token stands for more characters than this."""
        return self._max_token_chars

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """``text`` must be encodable as UTF-8 (``router.validation`` refuses the rest)."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._bos_id is not None:
            return [self._bos_id, *ids]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids outside the vocabulary add nothing; incomplete UTF-8 gives U+FFFD."""
        text: str = self._inner.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """What the token adds inside a text, special tokens spelled out.

        Decoded behind itself, because decoders may drop the space before a first word; once,
        because an answer with log-probabilities asks for thousands.
        """
        text = self._texts.get(token_id)
        if text is None:
            alone = self.decode([token_id], skip_special_tokens=False)
            text = self.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :]
            self._texts[token_id] = text
        return text

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def is_byte(self, token_id: int) -> bool:
        """One byte of a vocabulary with byte fallback: a run of them is decoded as one."""
        return token_id in self._byte_ids


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, empty where there is none. Raises ConfigError."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except ValueError as exc:
        raise ConfigError(f"{path} is not JSON: {exc}", param="model.path") from exc
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object", param="model.path")
    return config


def special_tokens(folder: Path) -> SpecialTokens:
    config = read_tokenizer_config(folder)
    return SpecialTokens(
        bos=_token_text(config.get("bos_token")), eos=_token_text(config.get("eos_token"))
    )


def _token_text(value: object) -> str:
    """A token is written as a string or as an object with its text under ``content``."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def _bos_id_to_add(inner: tokenizers.Tokenizer, config: dict[str, Any]) -> int | None:
    if config.get("add_bos_token") is not True:
        return None
    bos = _token_text(config.get("bos_token"))
    bos_id: int | None = inner.token_to_id(bos)
    if bos_id is None:
        raise ConfigError(
            f"tokenizer_config.json has add_bos_token: true, but its bos_token {bos!r} is not "
            "in tokenizer.json",
            param="model.path",
        )
    adds_it_already = inner.encode("", add_special_tokens=True).ids[:1] == [bos_id]
    return None if adds_it_already else bos_id
