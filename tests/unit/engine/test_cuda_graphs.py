"""Padding, and what is replayed: with a recorder that runs the same computation again on CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from baton.checkpoint.spec import load_spec
from baton.engine.cuda_graphs import (
    MAX_ROWS,
    CudaRecorder,
    DecodeGraphs,
    Recording,
    can_replay,
    padded_columns,
    padded_rows,
)
from baton.engine.kv_cache import KvCache
from baton.engine.models.decoder import Decoder
from baton.engine.models.model import assemble
from baton.engine.models.torch_backend import TorchBackend
from baton.engine.plan import SequenceChunk, StepPlan
from baton.engine.step_inputs import StepInputs, StepShape, build_inputs
from baton.engine.weights import load_parameters
from baton.protocol.layout import KvLayout
from baton.protocol.sampling import SamplingParams
from tests.support.tiny_checkpoint import write_checkpoint

NUM_BLOCKS, BLOCK_SIZE = 64, 8
LENGTHS = (1, 30, 8, 17, 55, 3, 9)
CONTEXT_BLOCKS = 8


class Model:
    """A tiny model with a cache that holds the prompts of seven sequences."""

    def __init__(self, folder: Path, device: str) -> None:
        target = torch.device(device)
        spec = load_spec(folder)
        backend = TorchBackend(target, deterministic=False)
        parameters = load_parameters(folder, spec, dtype=torch.float32, device=target)
        layout = KvLayout.uniform(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype="float32",
            model_digest="",
        )
        self.cache = KvCache(
            layout,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            dtype=torch.float32,
            device=target,
        )
        self.decoder = Decoder(spec, assemble(spec, parameters, backend), backend, target)
        self.shape = StepShape(spec.vocab_size, NUM_BLOCKS, BLOCK_SIZE, target)
        rng = np.random.default_rng(3)
        prompts = [rng.integers(0, spec.vocab_size, n).tolist() for n in LENGTHS]
        self.forward(self.inputs([(i, p, 0) for i, p in enumerate(prompts)]))

    def inputs(self, rows: list[tuple[int, list[int], int]]) -> StepInputs:
        """(sequence, tokens, start) each; sequence i owns eight blocks from 8 i on."""
        chunks = tuple(
            SequenceChunk(
                f"s{i}",
                tuple(tokens),
                start,
                tuple(range(8 * i, 8 * i + -(-(start + len(tokens)) // BLOCK_SIZE))),
                True,
                SamplingParams(temperature=0.0),
            )
            for i, tokens, start in rows
        )
        return build_inputs(StepPlan(1, chunks), self.shape)

    def forward(self, inputs: StepInputs) -> Tensor:
        return self.decoder.forward(inputs, self.cache)


class Again:
    """Stands for a graph: the same computation on the same tensors, into the same output."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run
        self.output = torch.full_like(run(), float("nan"))
        self.num_replays = 0

    def replay(self) -> None:
        self.output.copy_(self._run())
        self.num_replays += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def test_sizes_are_few_and_waste_little() -> None:
    sizes = [padded_rows(n) for n in range(1, MAX_ROWS + 1)]
    assert all(size >= n for n, size in enumerate(sizes, start=1))
    assert all(size <= n * 9 / 8 for n, size in enumerate(sizes, start=1) if n >= 64)
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 36
    assert [padded_rows(n) for n in (1, 2, 3, 8, 9, 17, 129, 512)] == [1, 2, 4, 8, 16, 24, 144, 512]
    assert [padded_columns(n) for n in (1, 64, 65, 1000)] == [64, 64, 128, 1024]


def test_steps_with_a_longer_chunk_are_not_replayed(folder: Path) -> None:
    model = Model(folder, "cpu")
    recorded: list[Again] = []

    def record(run: Callable[[], Tensor]) -> Recording:
        recorded.append(Again(run))
        return recorded[-1]

    graphs = DecodeGraphs(model.forward, record)
    mixed = model.inputs([(0, [5], 1), (1, [5, 6], 30)])
    assert not can_replay(mixed)
    assert graphs.logits(mixed) is None
    assert recorded == []


@torch.inference_mode()
def check_steps(eager: Model, replayed: Model, graphs: DecodeGraphs) -> None:
    """Batches that grow and shrink within one size: what an earlier one left must not show."""
    rng = np.random.default_rng(5)
    positions = list(LENGTHS)
    for count in (7, 5, 6, 1, 3, 7, 2, 4):
        chosen = rng.permutation(len(LENGTHS))[:count].tolist()
        rows = [(i, [int(rng.integers(0, 61))], positions[i]) for i in chosen]
        expected = eager.forward(eager.inputs(rows))
        found = graphs.logits(replayed.inputs(rows))
        assert found is not None
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        for i in chosen:
            positions[i] += 1
    torch.testing.assert_close(replayed.cache.blocks, eager.cache.blocks, atol=1e-4, rtol=1e-4)


def test_replayed_steps_equal_eager_ones_and_store_the_same(folder: Path) -> None:
    recorded: list[Again] = []

    def record(run: Callable[[], Tensor]) -> Recording:
        recorded.append(Again(run))
        return recorded[-1]

    replayed = Model(folder, "cpu")
    check_steps(Model(folder, "cpu"), replayed, DecodeGraphs(replayed.forward, record))
    assert len(recorded) == 4, "rows of 8, 1, 4 and 2; one width"
    assert sum(r.num_replays for r in recorded) == 8


def test_a_device_that_refuses_is_asked_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    num_asked = 0

    def refuse(run: Callable[[], Tensor]) -> Recording:
        nonlocal num_asked
        num_asked += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    model = Model(folder, "cpu")
    graphs = DecodeGraphs(model.forward, refuse)
    for start in (1, 2):
        assert graphs.logits(model.inputs([(0, [5], start)])) is None
    assert num_asked == 1
    assert "not permitted" in caplog.text


@pytest.mark.gpu
def test_graphs_on_a_gpu_equal_eager_steps(folder: Path) -> None:
    replayed = Model(folder, "cuda")
    graphs = DecodeGraphs(replayed.forward, CudaRecorder(torch.device("cuda")))
    check_steps(Model(folder, "cuda"), replayed, graphs)
