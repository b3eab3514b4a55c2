"""A tokenizer and a chat template without files: one token per byte, ids 0 to 255."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from router.chat_template import ChatTemplate
from router.tokenizer import Tokenizer

END_ID = 256
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|end|>"])
    return Tokenizer(inner)


def tiny_template() -> ChatTemplate:
    return ChatTemplate(TEMPLATE)
