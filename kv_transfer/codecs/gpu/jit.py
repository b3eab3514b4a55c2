"""Triton, where there is something to run it on; stand-ins elsewhere, as in ``baton.engine``.

A CPU build of torch comes without Triton; it is taken with a CUDA build, or when the process has
imported it before: that is how tests come to run kernels in its interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch

AVAILABLE = "triton" in sys.modules or (
    torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
)
_triton: Any = importlib.import_module("triton") if AVAILABLE else None
tl: Any = importlib.import_module("triton.language") if AVAILABLE else None


def jit(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` that compiles once for all values of the integer arguments ``varying``."""

    def decorate(kernel: Callable[..., Any]) -> Any:
        return _triton.jit(kernel, do_not_specialize=list(varying)) if AVAILABLE else kernel

    return decorate


def power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
