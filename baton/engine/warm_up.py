"""Have every kernel compiled before the first request: Triton compiles one when it is first called
with new types or widths, some seconds each on a machine that has not seen it.

Kernels are called as serving calls them, through the forward pass, on made-up rows: their slots
are -1, so nothing is stored, and they look at blocks that nobody uses yet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from baton.checkpoint.spec import ModelSpec
from baton.engine.kernels.paged_decode_attention import SPLIT_TOKENS
from baton.engine.kv_cache import KvCache
from baton.engine.models.decoder import Decoder
from baton.engine.sampling.kernel_draw import Draw
from baton.engine.shared_prefixes import MIN_ROWS
from baton.engine.step_inputs import SharedPrefixes, StepInputs, StepShape
from baton.protocol.sampling import SamplingParams

log = logging.getLogger(__name__)

FEW_ROWS = 2
Task = tuple[str, Callable[[], object]]


def warm_up(tasks: Iterator[Task]) -> None:
    """Says in the log how far it is: nothing else tells that a worker is not stuck."""
    began = time.perf_counter()
    for name, run in tasks:
        log.info("compiling kernels: %s", name)
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    log.info("kernels are ready after %.1f s", time.perf_counter() - began)


def warm_up_tasks(
    spec: ModelSpec, decoder: Decoder, draw: Draw, cache: KvCache, shape: StepShape
) -> Iterator[Task]:
    """What serving may call with this model. decoder: of this rank alone, for the others may take
    longer to load than a rank may wait."""
    experts = max((layer.num_experts for layer in spec.experts if layer is not None), default=0)
    # Products of many rows per expert have another tile than those of few.
    many_rows = FEW_ROWS + 16 * experts

    def forward(inputs: StepInputs) -> Callable[[], Tensor]:
        return lambda: decoder.forward(inputs, cache)

    yield "decodes and a prompt", forward(made_up(shape, FEW_ROWS, num_prompt_rows=many_rows))
    if shape.shares_prefixes:
        yield "few decodes, that begin alike", forward(made_up(shape, MIN_ROWS, has_prefix=True))
    yield (
        "drawing tokens",
        lambda: draw(
            torch.zeros(FEW_ROWS, shape.vocab_size, device=shape.device),
            [SamplingParams()] * FEW_ROWS,
            range(FEW_ROWS),
        ),
    )
    place = ((0,), 0, 1, 0, cache.layout.num_layers)
    yield "KV of a transfer", lambda: cache.write(*place, cache.read(*place))


def made_up(
    shape: StepShape, num_decodes: int, num_prompt_rows: int = 0, *, has_prefix: bool = False
) -> StepInputs:
    """``num_decodes`` sequences of one row, then a prompt; every token is 0, every block too."""
    num_rows = num_decodes + num_prompt_rows
    lengths = [SPLIT_TOKENS + 1 if has_prefix else 1] * num_decodes
    bounds = list(range(num_decodes + 1))
    if num_prompt_rows:
        lengths.append(num_prompt_rows)
        bounds.append(num_rows)

    def tensor(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=shape.device)

    shared = None
    if has_prefix:
        shared = SharedPrefixes(
            prefix_lens=tensor([SPLIT_TOKENS] * num_decodes),
            rows=tensor(list(range(num_decodes))),
            starts=tensor([0, num_decodes]),
        )
    return StepInputs(
        token_ids=tensor([0] * num_rows, torch.int64),
        positions=tensor([0] * num_rows, torch.int64),
        slots=tensor([-1] * num_rows, torch.int64),
        sample_rows=tensor([bound - 1 for bound in bounds[1:]], torch.int64),
        score_rows=tensor([], torch.int64),
        block_tables=tensor([0] * len(lengths) * -(-max(lengths) // shape.block_size)).view(
            len(lengths), -1
        ),
        cu_seqlens_q=tensor(bounds),
        cu_seqlens_prefill=tensor([bound - num_decodes for bound in bounds[num_decodes:]]),
        context_lens=tensor(lengths),
        num_decodes=num_decodes,
        shared=shared,
    )
