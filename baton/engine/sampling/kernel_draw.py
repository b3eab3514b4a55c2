"""The draws of ``engine.sampling.draw`` by one kernel, for devices that have one.

Rules and masks are in the logits by then, so that every request's parameters come down to
temperature, min-p, top-k and top-p: no batch is beyond the kernel. The numbers drawn at are the
same, keyed by (seed, position), and so are the tokens, but where rounding differs just at the
border between two. Plain torch asks the device several times how many tokens are left; this asks
nothing and goes up in one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from baton.engine.kernels.registry import kernels_for
from baton.engine.philox import uniforms
from baton.engine.sampling.draw import draw_tokens
from baton.protocol.sampling import SamplingParams

Draw = Callable[[Tensor, Sequence[SamplingParams], Sequence[int]], Tensor]
"""As ``draw_tokens``."""
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def draw_for(device: torch.device) -> Draw:
    """Raises ConfigError for a GPU whose kernels cannot be compiled here."""
    if device.type != "cuda":
        return draw_tokens
    return drawn_by(kernels_for(device).sample_top_k_top_p)


def drawn_by(kernel: Kernel) -> Draw:
    def draw(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> Tensor:
        if all(p.temperature <= 0 for p in params):
            return logits.argmax(dim=-1)
        columns = np.stack(
            [
                np.array([p.temperature for p in params]),
                np.array([min(p.top_k, logits.shape[1]) for p in params]),
                np.array([p.top_p for p in params]),
                np.array([p.min_p for p in params]),
                uniforms([p.seed for p in params], positions),
            ]
        )
        # float64 holds every one of them exactly.
        return kernel(logits, *torch.from_numpy(columns).to(logits.device))

    return draw
