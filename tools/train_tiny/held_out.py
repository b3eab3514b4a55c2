"""Loss on text that a model has never seen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

WINDOW_TOKENS = 2_048


@torch.inference_mode()
def held_out_loss(
    model: LlamaForCausalLM, documents: Sequence[torch.Tensor], window_tokens: int = WINDOW_TOKENS
) -> tuple[float, int]:
    """(nats per token, number of predicted tokens), over windows that do not overlap.

    documents: ``[num_tokens]`` each, begin token first. A window sees its own document only,
    and nothing of the window before it, so that first tokens are guessed from little.
    """
    total, count = 0.0, 0
    for document in documents:
        for window in document.split(window_tokens):
            if len(window) > 1:
                ids = window.to(model.device)
                logits = model(ids[None]).logits[0, :-1].float()
                total += cross_entropy(logits, ids[1:], reduction="sum").item()
                count += len(window) - 1
    return total / count, count
