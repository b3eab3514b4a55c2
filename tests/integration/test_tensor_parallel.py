"""One model over several processes: the tokens of one process, and of ``transformers``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from baton.engine.executor import Executor
from baton.engine.parallel import ranks
from baton.engine.parallel.messages import Join, LoadSettings
from baton.engine.plan import BlockSwap, SequenceChunk, StepPlan
from baton.protocol.config import ClusterConfig, EngineConfig, ModelConfig, PoolConfig, RouterConfig
from baton.protocol.errors import ConfigError
from tests.support.clusters import assert_no_residue, running_cluster, settled
from tests.support.parity import (
    BLOCK_SIZE,
    GREEDY,
    MAIN_CONFIGS,
    NUM_BLOCKS,
    Comparison,
    load_reference,
    make_sequences,
    reference_logits,
    run_greedy,
    save_random_model,
)
from tests.support.prompts import prompt_of
from tests.support.reference import count_near_ties, generate
from tests.support.tiny_checkpoint import write_checkpoint

PROMPT_TOKENS = (1, 3, 17, 100, 257, 333)
MAX_NEAR_TIE_SHARE = 1e-3

Load = Callable[..., Executor]


@pytest.fixture
def load() -> Iterator[Load]:
    """Executors that are closed when the test is over, however it ends."""
    loaded: list[Executor] = []

    def load(
        folder: Path,
        size: int,
        dtype: str = "float32",
        *,
        deterministic: bool = False,
        swap_blocks: int = 0,
    ) -> Executor:
        executor = Executor.load(
            folder,
            dtype=dtype,
            device="cpu",
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_threads=1,
            deterministic=deterministic,
            swap_blocks=swap_blocks,
            tensor_parallel=size,
        )
        loaded.append(executor)
        return executor

    yield load
    for executor in loaded:
        executor.close()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama-mha", (1, 2, 4)),
        ("llama-rope3-biases", (2,)),
        ("qwen3", (2,)),
        ("qwen3-moe", (2,)),
        ("phi3-partial", (2,)),
        ("gemma2", (2,)),
    ],
)
def test_greedy_tokens_are_those_of_transformers(
    name: str, sizes: tuple[int, ...], tmp_path: Path, load: Load
) -> None:
    """Experts, tensors stored fused, biases behind a sum, tied and capped logits among them."""
    save_random_model(MAIN_CONFIGS[name](), tmp_path)
    model = load_reference(tmp_path)
    found: list[list[list[int]]] = []
    num_ties = 0
    for size in sizes:
        executor = load(tmp_path, size)
        rng = np.random.default_rng(11)
        sequences = make_sequences(executor.spec.vocab_size, PROMPT_TOKENS, rng)
        run_greedy(executor, sequences, rng)
        seen = Comparison()
        for s in sequences:
            seen.add(s, reference_logits(model, s))
        print(
            f"{name} over {size}: {seen.num_tokens} greedy tokens, {seen.near_ties} near ties, "
            f"largest logit difference {seen.largest_difference:.1e}"
        )
        assert seen.near_ties <= MAX_NEAR_TIE_SHARE * seen.num_tokens
        num_ties += seen.near_ties
        found.append([s.tokens for s in sequences])
    if num_ties == 0:
        assert all(tokens == found[0] for tokens in found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sequence_continues_on_another_number_of_ranks(
    dtype: str, tmp_path: Path, load: Load
) -> None:
    """What ``read_kv`` gives is the whole model's, whoever wrote it; layers and tokens in parts."""
    save_random_model(MAIN_CONFIGS["llama-mha"](), tmp_path)
    executors = [load(tmp_path, size, dtype) for size in (1, 2, 4)]
    prompt = tuple(int(t) for t in np.random.default_rng(1).integers(3, 320, 45))
    tables = [(9, 3, 4, 1), (2, 8, 0, 5), (11, 12, 1, 3)]
    first = executors[0]
    first.forward_logits(StepPlan(0, (SequenceChunk("s", prompt, 0, tables[0], True, GREEDY),)))
    for source, target in ((0, 1), (1, 2)):
        assert executors[source].layout == executors[target].layout
        for layer in range(first.spec.num_layers):
            for start, count in ((0, 30), (30, 15)):
                part = (start, count, layer, 1)
                payload = executors[source].read_kv(tables[source], *part)
                assert payload.nbytes == count * first.layout.bytes_per_token_layer
                executors[target].write_kv(tables[target], *part, payload)
                assert bytes(payload) == bytes(first.read_kv(tables[0], *part))
    rows = [
        executor.forward_logits(StepPlan(1, (SequenceChunk("s", (7,), 45, table, True, GREEDY),)))
        for executor, table in zip(executors, tables, strict=True)
    ]
    for row in rows[1:]:
        assert torch.allclose(row, rows[0], atol=2e-5)


@pytest.mark.parametrize("size", [2, 4])
def test_deterministic_bits_do_not_depend_on_the_batch(
    size: int, tmp_path: Path, load: Load
) -> None:
    """Parts are added in the order of ranks, wherever a row stands in a batch or a chunk."""
    save_random_model(MAIN_CONFIGS["llama-mha"](), tmp_path)
    executor = load(tmp_path, size, deterministic=True)
    prompt = tuple(int(t) for t in np.random.default_rng(1).integers(3, 320, 77))

    def logits_of_last(cut: int, first_block: int, num_others: int) -> torch.Tensor:
        table = tuple(range(first_block, first_block + 5))
        head, tail = (
            SequenceChunk("s", prompt[:cut], 0, table, False, GREEDY),
            SequenceChunk("s", prompt[cut:], cut, table, True, GREEDY),
        )
        others = tuple(
            SequenceChunk(f"o{n}", (5 + n,), 0, (100 + n,), True, GREEDY) for n in range(num_others)
        )
        if cut:
            executor.forward_logits(StepPlan(0, (head, *others)))
        return executor.forward_logits(StepPlan(1, (*others, tail)))[-1]

    expected = logits_of_last(0, 0, 0)
    for cut, first_block, num_others in ((76, 10, 0), (76, 20, 33), (40, 30, 7), (1, 40, 1)):
        assert torch.equal(logits_of_last(cut, first_block, num_others), expected)


def test_ranks_swap_blocks_and_keep_rows_between_layer_groups(tmp_path: Path, load: Load) -> None:
    """Every rank does to its own KV heads what the plan says to the blocks."""
    save_random_model(MAIN_CONFIGS["llama-mha"](), tmp_path)
    executor = load(tmp_path, 2, deterministic=True, swap_blocks=4)
    prompt = tuple(range(5, 30))
    whole = SequenceChunk("a", prompt, 0, (0, 1), True, GREEDY)
    expected = executor.forward_logits(StepPlan(1, (whole,)))

    grouped = [
        SequenceChunk(
            "a", prompt, 0, (6, 7), samples, GREEDY, layer_start=layer, num_layers=num_layers
        )
        for layer, num_layers, samples in ((0, 1, False), (1, 2, True))
    ]
    for step, chunk in enumerate(grouped, 2):
        logits = executor.forward_logits(StepPlan(step, (chunk,)))
    assert torch.equal(logits, expected)

    follow = SequenceChunk("a", (9,), len(prompt), (0, 1), True, GREEDY)
    expected = executor.forward_logits(StepPlan(4, (follow,)))
    out = (BlockSwap(0, 2), BlockSwap(1, 0))
    other = SequenceChunk("b", tuple(range(40, 70)), 0, (0, 1), True, GREEDY)
    executor.forward_logits(StepPlan(5, (other,), swap_out=out))
    assert not torch.equal(executor.forward_logits(StepPlan(6, (follow,))), expected)
    back = (BlockSwap(10, 2), BlockSwap(11, 0))
    follow = SequenceChunk("a", (9,), len(prompt), (10, 11), True, GREEDY)
    logits = executor.forward_logits(StepPlan(7, (follow,), swap_in=back))
    assert torch.equal(logits, expected)


def test_sizes_that_do_not_divide_the_model_are_refused(tmp_path: Path, load: Load) -> None:
    folder = write_checkpoint(tmp_path)
    message = "tensor_parallel is 4; .*num_key_value_heads 2 is not a multiple of 4.*: 1, 2"
    with pytest.raises(ConfigError, match=message):
        load(folder, 4)


def test_what_a_rank_cannot_load_is_what_is_raised(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that rank 0 would load; the others are told of a folder that is not there."""

    def elsewhere(settings: LoadSettings, store_port: int, deadline_s: float) -> Join:
        moved = msgspec.structs.replace(settings, folder=str(tmp_path / "gone"))
        return Join(settings=moved, store_port=store_port, deadline_s=deadline_s)

    monkeypatch.setattr(ranks, "Join", elsewhere)
    with pytest.raises(ConfigError, match=r"rank 1: .*gone"):
        load(write_checkpoint(tmp_path / "here"), 2)


async def test_one_rank_hands_over_to_two(tmp_path: Path) -> None:
    """A prefill worker of one process, a decode worker of two, as Ray actors: the tokens of
    transformers, and no process is left."""
    config = ClusterConfig(
        version=1,
        model=ModelConfig(path="baton-tiny", dtype="float32"),
        pools=(
            PoolConfig(name="p", role="prefill", engine=EngineConfig(max_num_batched_tokens=128)),
            PoolConfig(name="d", role="decode", tensor_parallel=2),
        ),
        router=RouterConfig(grpc_port=0, http_port=0),
    )
    prompts = [prompt_of(length, seed) for seed, length in enumerate((5, 64, 200, 33))]
    async with running_cluster(config, tmp_path, "ray") as cluster:
        outputs = []
        for ids in prompts:
            completion = await cluster.client.generate(ids, max_tokens=24, temperature=0.0)
            outputs.append([t.token_id for t in completion.choices[0].tokens])
        loads = await settled(cluster)
        assert {w.worker_id: w.kv_bytes_received > 0 for w in loads.workers}["d-0"]
        await assert_no_residue(cluster)
    num_ties = sum(count_near_ties(i, t) for i, t in zip(prompts, outputs, strict=True))
    assert num_ties <= 1
    if num_ties == 0:
        assert outputs == [generate(ids, 24) for ids in prompts]
