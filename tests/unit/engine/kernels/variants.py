"""Which compiled kernels serving asks for, and whether the warm-up asked for them before.

Not collected by itself: ``test_warm_up.py`` runs this file in a process of its own, in which a
launch notes the key under which Triton would look for the compiled kernel, and does no more. So
outputs hold anything, and what is compared is keys alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from baton.engine.executor import Executor
from baton.engine.kernels.registry import TRITON
from baton.engine.models import torch_backend
from baton.engine.models.decoder import Decoder
from baton.engine.models.torch_backend import TorchBackend
from baton.engine.plan import SequenceChunk, StepPlan
from baton.engine.sampler import Sampler
from baton.engine.sampling.kernel_draw import drawn_by
from baton.engine.warm_up import Task, warm_up, warm_up_tasks
from baton.protocol.sampling import SamplingParams
from tests.support.parity import MAIN_CONFIGS, save_random_model
from tools.compile_kernels import NoDevice

BLOCK_SIZE = 32


class HalfPrecision(TorchBackend):
    """As on a GPU: weights are kept in the model's dtype."""

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Kernels with their keys, from now on."""
    found: set[str] = set()
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        launch(self, *args, grid=grid, warmup=True, **kwargs)

    def note(self: Any, key: object, *_: object) -> None:
        found.add(f"{self.__name__}: {key}")

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(JITFunction, "_do_compile", note)
    monkeypatch.setattr(torch_backend, "kernels_for", lambda device: TRITON)
    driver.set_active(NoDevice())
    return found


def load(folder: Path, monkeypatch: pytest.MonkeyPatch, *, deterministic: bool) -> Executor:
    def backend_for(device: torch.device, **_: object) -> TorchBackend:
        return HalfPrecision(device, deterministic=deterministic)

    monkeypatch.setattr("baton.engine.executor.backend_for", backend_for)
    executor = Executor.load(
        folder, dtype="bfloat16", device="cpu", num_blocks=128, block_size=BLOCK_SIZE,
        num_threads=1, deterministic=deterministic,
    )  # fmt: skip
    executor._cache._kernels = TRITON
    executor._sampler = Sampler((0,), drawn_by(TRITON.sample_top_k_top_p))
    return executor


def chunk(name: int, num_tokens: int, start: int, first_block: int | None = None) -> SequenceChunk:
    """first_block: of its own ones, behind 20 blocks in common."""
    num_blocks = -(-(start + num_tokens) // BLOCK_SIZE)
    table = tuple(range(num_blocks))
    if first_block is not None:
        table = (*range(20), *range(first_block, first_block + num_blocks - 20))
    params = SamplingParams(temperature=name % 3, top_k=name % 5, top_p=0.9, seed=name)
    return SequenceChunk(f"s{name}", (1,) * num_tokens, start, table, True, params)


def serve(executor: Executor) -> None:
    """Steps of every kind and of awkward sizes, KV out and in."""
    steps = (
        [chunk(0, 1, 0)],
        [chunk(0, 1, 15)],
        [chunk(0, 1, 16), chunk(1, 1, 700), chunk(2, 1, 33)],
        [chunk(n, 1, 40 + n) for n in range(17)],
        [chunk(0, 5, 0)],
        [chunk(0, 2, 31), chunk(1, 16, 3)],
        [chunk(0, 333, 64), chunk(1, 1, 8), chunk(2, 1, 9)],
        [chunk(n, 1, 650 + n, 20 + 2 * n) for n in range(40)],
        [*(chunk(n, 1, 660, 20 + 2 * n) for n in range(36)), chunk(40, 1, 7), chunk(41, 9, 0)],
    )
    for step, chunks in enumerate(steps):
        executor.execute(StepPlan(step, tuple(chunks)))
    layers = executor.layout.num_layers
    for start, num_tokens, first, num_layers in ((0, 1, 0, 1), (3, 17, 0, layers), (5, 64, 1, 1)):
        place = ((7, 3, 9), start, num_tokens, first, num_layers)
        executor.write_kv(*place, executor.read_kv(*place))


def tasks_of(executor: Executor) -> Iterator[Task]:
    decoder, shape = executor._decoder, executor._shape
    alone = Decoder(executor.spec, decoder._model, decoder._backend, shape.device)
    return warm_up_tasks(executor.spec, alone, executor._sampler._draw, executor._cache, shape)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["llama-mha", "gemma2", "qwen3-moe"])
@torch.inference_mode()
def test_serving_asks_for_nothing_that_the_warm_up_did_not(
    name: str,
    deterministic: bool,
    tmp_path: Path,
    asked: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_random_model(MAIN_CONFIGS[name](), tmp_path)
    executor = load(tmp_path, monkeypatch, deterministic=deterministic)
    warm_up(tasks_of(executor))
    ready = set(asked)
    asked.clear()
    serve(executor)
    assert any(key.startswith("_prefix_split_kernel") for key in asked) != deterministic
    assert asked <= ready, "\n".join(sorted(asked - ready))


@torch.inference_mode()
def test_no_part_of_the_warm_up_can_be_left_out(
    tmp_path: Path, asked: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_random_model(MAIN_CONFIGS["qwen3-moe"](), tmp_path)
    executor = load(tmp_path, monkeypatch, deterministic=False)
    serve(executor)
    needed = set(asked)
    names = [name for name, _ in tasks_of(executor)]
    assert len(names) == 4
    for left_out in names:
        asked.clear()
        warm_up(task for task in tasks_of(executor) if task[0] != left_out)
        assert not needed <= asked, f"{left_out} is of no use"
