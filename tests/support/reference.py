"""The outside evidence: greedy tokens of transformers, and how close a choice was where
ours differ."""

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
def generate(prompt_ids: Sequence[int], max_tokens: int) -> list[int]:
    """``transformers.generate``, greedy, ending at EOS."""
    model = _model()
    ids = torch.tensor([list(prompt_ids)])
    out = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=2,
    )
    return out[0, len(prompt_ids) :].tolist()


@torch.inference_mode()
def count_near_ties(prompt_ids: Sequence[int], token_ids: Sequence[int]) -> int:
    """Each of ``token_ids`` must be what the reference, given the same prefix, likes best.

    One forward pass over all of them. Returns how many are only as good as the best within
    NEAR_TIE; fails for any that is worse. Without near ties this is token-for-token
    equality with greedy generation that does not end at EOS.
    """
    ids = torch.tensor([[*prompt_ids, *token_ids]])
    logits = _model()(ids).logits[0, len(prompt_ids) - 1 : -1]
    best = logits.max(dim=-1)
    ours = torch.tensor(list(token_ids))
    gap = best.values - logits.gather(1, ours[:, None])[:, 0]
    worst = int(gap.argmax())
    assert gap[worst] < NEAR_TIE, (
        f"token {worst} is {int(ours[worst])}, transformers takes {int(best.indices[worst])}, "
        f"{float(gap[worst]):.5f} better"
    )
    return int((best.indices != ours).sum())


@torch.inference_mode()
def reference_logprobs(prompt_ids: Sequence[int], num_tokens: int) -> torch.Tensor:
    """Log-probabilities ``[num_tokens, vocab]`` along the reference's own greedy path."""
    model = _model()
    ids = list(prompt_ids)
    rows = []
    for _ in range(num_tokens):
        row = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1].float(), dim=-1)
        rows.append(row)
        ids.append(int(row.argmax()))
    return torch.stack(rows)


@torch.inference_mode()
def prompt_logprobs(prompt_ids: Sequence[int]) -> torch.Tensor:
    """Log-probabilities ``[num_tokens - 1, vocab]`` of the prompt's tokens behind the first."""
    logits: torch.Tensor = _model()(torch.tensor([list(prompt_ids)])).logits[0, :-1]
    return logits.float().log_softmax(dim=-1)
