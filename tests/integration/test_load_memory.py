"""Loading needs room for one copy of a model, not for a file, a copy and a packed one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_checkpoint import TINY_LLAMA, tiny_weights, write_checkpoint

CONFIG = TINY_LLAMA | {
    "vocab_size": 8_000,
    "hidden_size": 512,
    "intermediate_size": 1_408,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
NUM_BLOCKS = 16
CHILD = """
import resource, sys
from pathlib import Path
from baton.engine.executor import Executor

def load(folder):
    return Executor.load(
        Path(folder), dtype="float32", device="cpu", num_blocks=16, block_size=16, num_threads=1
    )

load(sys.argv[1]).close()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load(sys.argv[2]).close()
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_the_peak_is_little_more_than_the_model(tmp_path: Path) -> None:
    weights = tiny_weights(CONFIG)
    model_bytes = sum(w.nbytes for w in weights.values())
    assert model_bytes > 120 * 2**20
    small = write_checkpoint(tmp_path / "small")
    large = write_checkpoint(tmp_path / "large", CONFIG, weights)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(large)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    kv_bytes = 12 * 2 * (NUM_BLOCKS + 1) * 16 * 4 * 64 * 4
    assert int(done.stdout) < 1.3 * (model_bytes + kv_bytes)
