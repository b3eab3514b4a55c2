"""The outside evidence: greedy tokens of transformers' own ``generate``, and how close a
choice was where ours differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from transformers import AutoModelForCausalLM

from baton.checkpoint.find import resolve

NEAR_TIE = 1e-4
"""Two logits of the reference closer than this count as a tie that arithmetic may flip."""


@cache
def _model() -> torch.nn.Module:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(resolve("baton-tiny"), dtype=torch.float32)
    return model.eval()


@torch.inference_mode()
def greedy(prompt_ids: Sequence[int], max_tokens: int, *, ignore_eos: bool = False) -> list[int]:
    model = _model()
    ids = torch.tensor([list(prompt_ids)])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=None if ignore_eos else model.config.eos_token_id,
        pad_token_id=2,
    )
    return out[0, len(prompt_ids) :].tolist()


@torch.inference_mode()
def _is_near_tie(prefix_ids: Sequence[int]) -> bool:
    """Whether the reference's two best next tokens are almost equal."""
    best = torch.topk(_model()(torch.tensor([list(prefix_ids)])).logits[0, -1], 2).values
    return bool(best[0] - best[1] < NEAR_TIE)


def assert_same(prompt_ids: Sequence[int], ours: Sequence[int], expected: Sequence[int]) -> bool:
    """True when identical, False when the first difference is a near tie of the reference."""
    ours, expected = list(ours), list(expected)
    if ours == expected:
        return True
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b),
        min(len(ours), len(expected)),
    )
    assert at < min(len(ours), len(expected)), f"lengths differ: {len(ours)}, {len(expected)}"
    assert _is_near_tie([*prompt_ids, *expected[:at]]), (
        f"token {at} differs and is no near tie: {ours[at]} instead of {expected[at]}"
    )
    return False
