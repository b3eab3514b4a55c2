"""The kernel's reference draws what plain torch draws; the kernel itself: ``kernels/parity.py``."""

from __future__ import annotations

import numpy as np
import torch

from baton.engine.kernels.registry import REFERENCES
from baton.engine.sampling.draw import draw_tokens
from baton.engine.sampling.kernel_draw import draw_for, drawn_by
from baton.protocol.sampling import SamplingParams
from tests.unit.engine.kernels.cases import requests

draw = drawn_by(REFERENCES.sample_top_k_top_p)


def test_the_same_tokens_for_every_combination_of_filters() -> None:
    torch.manual_seed(2)
    logits = 3 * torch.randn(480, 613)
    logits[::3] = logits[::3].round()
    logits[:, ::5] = float("-inf")
    params, positions = requests(480, 613), np.arange(480).tolist()
    plain = draw_tokens(logits, params, positions)
    assert torch.equal(draw(logits, params, positions), plain)
    assert len(set(plain.tolist())) > 100


def test_greedy_batches_need_no_kernel() -> None:
    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("asked")

    logits = torch.tensor([[0.0, 2.0, 2.0], [3.0, 3.0, 1.0]])
    greedy = [SamplingParams(temperature=0.0, top_p=0.5)] * 2
    assert drawn_by(refuse)(logits, greedy, [0, 1]).tolist() == [1, 0]


def test_without_a_gpu_draws_are_plain_torch() -> None:
    assert draw_for(torch.device("cpu")) is draw_tokens
