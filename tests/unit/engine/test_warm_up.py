"""What the warm-up runs, on plain torch; that it is enough: ``kernels/variants.py``."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.engine.executor import Executor
from baton.engine.kernels.registry import REFERENCES, Kernels
from baton.engine.models import torch_backend
from baton.engine.models.torch_backend import TorchBackend
from baton.engine.sampling.kernel_draw import drawn_by
from baton.engine.warm_up import warm_up, warm_up_tasks
from tests.support.tiny_checkpoint import write_checkpoint

NOT_OF_A_LLAMA = {"gelu_tanh_mul", "grouped_matmul"}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the operations that the backend, the cache and the sampler call."""
    names: set[str] = set()

    def noted(name: str) -> Any:
        operation = getattr(REFERENCES, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            names.add(name)
            return operation(*args, **kwargs)

        return call

    kernels = replace(REFERENCES, **{f.name: noted(f.name) for f in fields(Kernels)})
    monkeypatch.setattr(torch_backend, "kernels_for", lambda device: kernels)
    return names


@torch.inference_mode()
def test_every_operation_runs_and_the_cache_stays_as_it_was(
    tmp_path: Path,
    called: set[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        "baton.engine.executor.backend_for",
        lambda device, **_: TorchBackend(device, deterministic=False),
    )
    executor = Executor.load(
        write_checkpoint(tmp_path),
        dtype="float32",
        device="cpu",
        num_blocks=4,
        block_size=16,
        num_threads=1,
    )
    cache, kernels = executor._cache, torch_backend.kernels_for(torch.device("cpu"))
    cache._kernels = kernels
    cache.blocks.normal_()
    before = cache.blocks.clone()
    draw = drawn_by(kernels.sample_top_k_top_p)
    caplog.set_level(logging.INFO)
    warm_up(warm_up_tasks(executor.spec, executor._decoder, draw, cache, executor._shape))
    assert called == {field.name for field in fields(Kernels)} - NOT_OF_A_LLAMA
    assert torch.equal(cache.blocks, before)
    assert "compiling kernels: KV of a transfer" in caplog.text
    assert "kernels are ready after" in caplog.text
