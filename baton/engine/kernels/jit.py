"""Triton for the kernel files, where there is something to run it on; stand-ins elsewhere.

A CPU build of torch comes without Triton, and a CPU worker should not pay for importing it where
it happens to be installed. So it is taken with a CUDA build of torch, or when the process has
imported it before the kernel files: that is how tests come to run kernels in its interpreter.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

AVAILABLE = "triton" in sys.modules or (
    torch.version.cuda is not None and importlib.util.find_spec("triton") is not None
)
_triton: Any = importlib.import_module("triton") if AVAILABLE else None
tl: Any = importlib.import_module("triton.language") if AVAILABLE else None
INTERPRETED: bool = AVAILABLE and bool(_triton.knobs.runtime.interpret)


def jit(kernel: Callable[..., Any]) -> Any:
    """``triton.jit``; without Triton the function itself, which nothing calls then."""
    return _triton.jit(kernel) if AVAILABLE else kernel


def jit_sizes(*varying: str, tables: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """``jit`` for a kernel whose integer arguments ``varying`` change from step to step, and whose
    tensors ``tables`` are slices that begin anywhere: it is not compiled anew, in the middle of
    serving, when one of them happens to be 1 or a multiple of 16."""

    def decorate(kernel: Callable[..., Any]) -> Any:
        if not AVAILABLE:
            return kernel
        return _triton.jit(
            kernel,
            do_not_specialize=list(varying),
            do_not_specialize_on_alignment=list(tables),
        )

    return decorate


def power_of_two(count: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``count`` and ``least``: tiles have such sides."""
    return max(least, 1 << (count - 1).bit_length())
