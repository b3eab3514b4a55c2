"""The fuzz harness runs, with bounds checks that bite, and finds nothing in a few seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BEYOND_THE_END = """
import numpy as np
from kv_transfer.codecs.fp8_compiled import _look_up
try:
    _look_up(np.full(4, 9, np.uint8), np.zeros(8, np.uint16), np.zeros(4, np.uint16))
except IndexError:
    print("caught")
"""


def run(arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_bounds_checks_bite(tmp_path):
    """Without them this read would pass unseen."""
    settings = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    assert run(["-c", BEYOND_THE_END], **settings) == "caught\n"


def test_damaged_streams_are_refused_and_do_no_harm():
    printed = run(["-m", "tests.fuzz.codecs", "--seconds", "3", "--seed", "7"])
    assert "nothing but CodecError" in printed
    outcomes = dict(re.findall(r"^  (\S+ sealed: refused) +([\d,]+)$", printed, re.MULTILINE))
    assert {name.split()[0] for name in outcomes} >= {"raw", "split", "entropy", "int8", "int4"}
