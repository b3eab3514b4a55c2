from __future__ import annotations

from pathlib import Path

import pytest

from baton.protocol.errors import ConfigError
from benchmarks.arrivals import Fixed, Uniform
from benchmarks.measure import segment_s
from benchmarks.serve import WORKLOAD
from benchmarks.workload import load_workload

GOOD = """
name = "small"
seed = 3
[prompt_tokens]
distribution = "uniform"
min = 4
max = 8
[output_tokens]
distribution = "fixed"
tokens = 5
[slo]
ttft_ms = 100
tpot_ms = 10
[schedule]
rates_rps = [1, 2.5]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "workload.toml"
    path.write_text(text)
    return path


def test_reads_a_file_and_fills_in_the_rest(tmp_path: Path) -> None:
    workload = load_workload(write(tmp_path, GOOD))
    assert workload.prompt_tokens == Uniform(min=4, max=8)
    assert workload.output_tokens == Fixed(tokens=5)
    assert workload.schedule.rates_rps == (1.0, 2.5)
    assert workload.limits.ttft_ms == 100
    assert workload.gate.output_tokens == 32
    assert workload.longest_tokens == 8 + 32, "the gate asks for more than the load"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 3", "", "seed"),
        ("seed = 3", "seed = 3\nsed = 4", "sed"),
        ('"fixed"', '"fix"', "fix"),
        ("tokens = 5", "tokens = 0", "output_tokens"),
        ("min = 4", "min = 9", "prompt_tokens: min is 9, max is 8"),
        ("rates_rps = [1, 2.5]", "rates_rps = []", "rates_rps"),
        ("rates_rps = [1, 2.5]", "rates_rps = [0]", "rates_rps"),
        ('name = "small"', 'name = "Small one"', "name"),
        ("ttft_ms = 100", "ttft_ms = ", "is not TOML"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_workload(write(tmp_path, GOOD.replace(old, new)))
    assert said in caught.value.message
    assert "workload.toml" in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_workload(tmp_path / "none.toml")


def test_the_default_workload_takes_about_three_minutes() -> None:
    workload = load_workload(WORKLOAD)
    schedule = workload.schedule
    num_segments = 2 * schedule.repeats * len(schedule.rates_rps)
    assert 120 <= num_segments * segment_s(schedule) <= 180
