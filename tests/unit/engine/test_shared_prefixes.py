"""Decodes that begin alike, run through a whole model: the logits must not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from baton.engine.cuda_graphs import DecodeGraphs, Recording, empty_inputs, fill
from baton.engine.executor import Executor
from baton.engine.models import backends
from baton.engine.models.torch_backend import TorchBackend
from baton.engine.plan import SequenceChunk, StepPlan
from baton.engine.step_inputs import SharedPrefixes, StepInputs, StepShape, build_inputs
from baton.engine.warm_up import made_up
from baton.protocol.sampling import SamplingParams
from tests.support.tiny_checkpoint import TINY_LLAMA, TINY_MISTRAL, write_checkpoint
from tests.unit.engine.test_cuda_graphs import Again

BLOCK_SIZE = 32
PREFIX_BLOCKS = 33
"""1,056 tokens in common, of which two splits of 512 are shared."""
NUM_ROWS = 18
LONG = {"max_position_embeddings": 2_048}
GREEDY = SamplingParams(temperature=0.0)


def own_table(row: int) -> tuple[int, ...]:
    return (*range(PREFIX_BLOCKS), PREFIX_BLOCKS + row)


def prompt(row: int) -> tuple[int, ...]:
    """Its first ``PREFIX_BLOCKS`` blocks are those of every row; 1 to 18 tokens follow."""
    rng = np.random.default_rng(1)
    common = rng.integers(0, 61, PREFIX_BLOCKS * BLOCK_SIZE).tolist()
    own = np.random.default_rng(2 + row).integers(0, 61, 1 + row).tolist()
    return (*common, *own)


def decodes() -> tuple[SequenceChunk, ...]:
    """Each row's next token, and between them a sequence that shares nothing."""
    chunks = [
        SequenceChunk(
            f"s{row}", (5,), len(prompt(row)), own_table(row), samples=True, sampling=GREEDY
        )
        for row in range(NUM_ROWS)
    ]
    alone = SequenceChunk("alone", (7,), 3, (60,), samples=True, sampling=GREEDY)
    return (*chunks[:5], alone, *chunks[5:])


class Model:
    """With every prompt's KV in place."""

    def __init__(self, folder: Path, device: str) -> None:
        self.executor = Executor.load(
            folder,
            dtype="float32",
            device=device,
            num_blocks=64,
            block_size=BLOCK_SIZE,
            num_threads=1,
        )
        start = PREFIX_BLOCKS * BLOCK_SIZE
        self.run(SequenceChunk("first", prompt(0)[:start], 0, own_table(0), False, GREEDY))
        self.run(SequenceChunk("alone", (4, 5, 6), 0, (60,), False, GREEDY))
        for row in range(NUM_ROWS):
            own = prompt(row)[start:]
            self.run(SequenceChunk(f"s{row}", own, start, own_table(row), False, GREEDY))

    def run(self, *chunks: SequenceChunk) -> torch.Tensor:
        return self.executor.forward_logits(StepPlan(0, chunks))

    def shape(self, *, shares_prefixes: bool) -> StepShape:
        return StepShape(61, 64, BLOCK_SIZE, torch.device("cpu"), shares_prefixes)


@pytest.fixture(params=["llama", "mistral"])
def model(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Model:
    config = {"llama": TINY_LLAMA, "mistral": TINY_MISTRAL}[request.param]
    folder = write_checkpoint(tmp_path_factory.mktemp("model"), config | LONG)
    monkeypatch.setattr(
        "baton.engine.executor.backend_for",
        lambda device, **_: TorchBackend(device, deterministic=False),
    )
    return Model(folder, "cpu")


def test_a_step_finds_the_group_and_gives_the_logits_of_each_row_alone(model: Model) -> None:
    chunks = decodes()
    inputs = build_inputs(StepPlan(0, chunks), model.shape(shares_prefixes=True))
    assert inputs.shared is not None
    assert inputs.shared.starts.tolist() == [0, NUM_ROWS]
    assert sorted(inputs.shared.rows.tolist()) == [n for n in range(NUM_ROWS + 1) if n != 5]
    assert inputs.shared.prefix_lens.tolist() == [1_024] * 5 + [0] + [1_024] * 13
    together = model.run(*chunks)
    alone = torch.cat([model.run(chunk) for chunk in chunks])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_beside_a_longer_chunk_decodes_are_grouped_too(model: Model) -> None:
    chunks = decodes()
    long = SequenceChunk("long", (3, 9, 9, 4), 0, (61,), samples=True, sampling=GREEDY)
    together = model.run(*chunks[:9], long, *chunks[9:])
    alone = torch.cat([model.run(c) for c in (*chunks[:9], long, *chunks[9:])])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_replayed_steps_know_what_each_of_them_shares(model: Model) -> None:
    """Fewer rows and groups than the graph has room for; then a step that shares nothing."""
    recorded: list[Again] = []

    def record(run: Callable[[], torch.Tensor]) -> Recording:
        recorded.append(Again(run))
        return recorded[-1]

    executor = model.executor
    graphs = DecodeGraphs(lambda i: executor._decoder.forward(i, executor._cache), record)
    shape = model.shape(shares_prefixes=True)
    for chunks, shares in (
        (decodes(), True),
        (decodes()[1:], True),
        (decodes()[:17], False),
        (decodes(), True),
    ):
        inputs = build_inputs(StepPlan(0, chunks), shape)
        assert (inputs.shared is not None) == shares
        found = graphs.logits(inputs)
        assert found is not None
        alone = torch.cat([model.run(chunk) for chunk in chunks])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)
    assert len(recorded) == 2, "24 rows with a shared prefix, and without"


def test_groups_of_an_earlier_step_do_not_stay_in_a_graphs_inputs() -> None:
    shape = StepShape(61, 64, BLOCK_SIZE, torch.device("cpu"))

    def step(num_rows: int, *sizes: int) -> StepInputs:
        starts = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).int()
        rows = torch.arange(num_rows, dtype=torch.int32).flip(0)[: sum(sizes)]
        shared = SharedPrefixes(torch.full((num_rows,), 512, dtype=torch.int32), rows, starts)
        return replace(made_up(shape, num_rows), shared=shared)

    own = empty_inputs(step(17, 4, 4, 5), 24, 64)
    for inputs in (step(17, 4, 4, 5), step(9, 6)):
        fill(own, inputs)
        assert own.shared is not None
        assert inputs.shared is not None
        num_rows, num_bounds = inputs.num_decodes, len(inputs.shared.starts)
        assert own.shared.prefix_lens.tolist() == [512] * num_rows + [0] * (24 - num_rows)
        assert len(own.shared.rows) == 24
        assert torch.equal(own.shared.rows[: len(inputs.shared.rows)], inputs.shared.rows)
        bounds = own.shared.starts.tolist()
        assert bounds[:num_bounds] == inputs.shared.starts.tolist()
        assert bounds[num_bounds:] == [bounds[num_bounds - 1]] * (7 - num_bounds)


def test_only_a_backend_that_may_sum_in_another_order_shares() -> None:
    cpu = torch.device("cpu")
    assert TorchBackend(cpu, deterministic=False).shares_prefixes
    assert not TorchBackend(cpu, deterministic=True).shares_prefixes
    compiled = backends.backend_for(cpu, num_threads=1, deterministic=False)
    assert not compiled.shares_prefixes
    plan = StepPlan(0, decodes())
    assert build_inputs(plan, StepShape(61, 64, BLOCK_SIZE, cpu)).shared is None


@pytest.mark.gpu
def test_graphs_on_a_gpu_read_a_common_prefix_once(tmp_path: Path) -> None:
    model = Model(write_checkpoint(tmp_path, TINY_LLAMA | LONG), "cuda")
    alone = torch.cat([model.run(chunk) for chunk in decodes()])
    for chunks, rows in ((decodes(), slice(None)), (decodes()[1:], slice(1, None))):
        torch.testing.assert_close(model.run(*chunks), alone[rows], atol=1e-4, rtol=1e-4)
    graphs = model.executor._graphs
    assert graphs is not None
    assert [key[0] for key in graphs._graphs if key[2]] == [24]
