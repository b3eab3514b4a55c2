"""Runs ``variants.py`` in a process in which Triton is asked for kernels and launches none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOADER = "import sys, triton, pytest; sys.exit(pytest.main(sys.argv[1:]))"
"""Triton comes first: the kernel files take it only where it is already there."""


def test_the_warm_up_asks_for_every_kernel_that_serving_asks_for() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LOADER, "tests/unit/engine/kernels/variants.py", "-q"],
        cwd=ROOT,
        env={**environment, "PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout, done.stdout
