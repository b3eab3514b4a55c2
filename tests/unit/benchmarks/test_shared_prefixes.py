"""The comparison's rows, on references that are called and not timed."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner

from baton.engine.kernels.registry import REFERENCES
from benchmarks import shared_prefixes
from benchmarks.kernel_cases import CaseMaker, Sizes
from benchmarks.kernels import NO_GPU
from benchmarks.shared_prefixes import compared, is_ruled_in, main, table_of

SMALL = Sizes(heads=2, kv_heads=1, head_dim=8, block_size=32, suffix=4)


def test_both_ways_run_and_are_compared() -> None:
    torch.manual_seed(0)
    maker, results = CaseMaker(REFERENCES, torch.device("cpu"), SMALL), []

    def seconds_of(run: Callable[[], object]) -> float:
        results.append(run())
        return 1e-6 * (1 + len(results) % 2)

    with patch.multiple(shared_prefixes, ROWS=(3,), PREFIXES=(512,)):
        (row,) = compared(maker, seconds_of)
    assert len(results) == 2
    assert (row.num_rows, row.prefix_len, row.is_ruled_in) == (3, 512, False)
    (ratio,) = table_of([row], "title").columns[4].cells
    assert ratio == "2.00"


def test_the_rule_is_the_engines() -> None:
    assert not is_ruled_in(3, 16_384)
    assert is_ruled_in(4, 8_192)
    assert not is_ruled_in(32, 512)
    assert is_ruled_in(33, 512)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time")
def test_without_a_gpu_one_line_says_so() -> None:
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 2
    assert done.stderr.strip() == NO_GPU
