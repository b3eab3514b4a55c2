"""The arithmetic of floors, and every case's call at small sizes on the references."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from baton.engine.kernels.registry import REFERENCES
from benchmarks.kernel_cases import Case, CaseMaker, Sizes
from benchmarks.kernels import NO_GPU, Rates, main, rated, table_of

SMALL = Sizes(
    heads=4,
    kv_heads=2,
    head_dim=8,
    hidden=16,
    inner=24,
    vocab=50,
    experts=3,
    block_size=4,
    layers=2,
    rows=12,
    batch=3,
    context=16,
    chunk=6,
    suffix=4,
)


def test_every_operation_has_a_case_that_runs() -> None:
    torch.manual_seed(0)
    names = set()
    for case in CaseMaker(REFERENCES, torch.device("cpu"), SMALL).all():
        case.run()
        assert case.num_bytes > 0
        names.add(case.name)
    assert names == set(REFERENCES.__slots__)


def test_decode_counts_keys_and_values_once() -> None:
    case = CaseMaker(REFERENCES, torch.device("cpu"), SMALL).decode(3, 16)
    keys_and_values = 2 * 3 * 16 * 2 * 8 * 2
    queries_and_results = 2 * 3 * 4 * 8 * 2
    assert case.num_bytes == keys_and_values + queries_and_results


def test_prefill_counts_visible_pairs_only() -> None:
    case = CaseMaker(REFERENCES, torch.device("cpu"), SMALL).prefill(6, 16)
    pairs = sum(range(11, 17))
    assert case.num_flops == 4 * 4 * 8 * pairs


@pytest.mark.parametrize(
    ("num_bytes", "num_flops", "floor_micros", "bound"),
    [(4_000_000, 0, 1.0, "bytes"), (4_000_000, 2_000_000_000, 2.0, "flops")],
)
def test_the_floor_is_the_longer_of_two_times(
    num_bytes: int, num_flops: int, floor_micros: float, bound: str
) -> None:
    rates = Rates(copy_bytes_per_s=4e12, matmul_flops_per_s=1e15)
    case = Case("op", "shape", lambda: None, num_bytes, num_flops, target=0.5)
    timing = rated(case, 4e-6, rates)
    assert (timing.floor_micros, timing.bound) == (floor_micros, bound)
    assert timing.share == floor_micros / 4
    met = list(table_of([timing], "title").columns[-1].cells)
    assert met == ["50% met" if timing.share >= 0.5 else "50% MISSED"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_without_a_gpu_one_line_says_so() -> None:
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 2
    assert done.stderr.strip() == NO_GPU
