"""Runs ``gpu_lossy_parity.py`` where Triton interprets its kernels, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOADER = "import sys, triton, pytest; sys.exit(pytest.main(sys.argv[1:]))"
"""Triton comes first: the kernel files take it only where it is already there."""


def test_the_lossy_kernels_equal_the_host() -> None:
    path = "tests/unit/kv_transfer/codecs/gpu_lossy_parity.py"
    done = subprocess.run(
        [sys.executable, "-c", LOADER, path, "-q"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) == 4, done.stdout
