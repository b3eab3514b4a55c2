"""numba for the compiled codecs: nogil, no fast arithmetic, machine code kept between starts.

Kernels are scalar loops over arrays. numba checks no bounds: whoever calls a kernel has compared
every length with every other first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Compiled at its first call, for the types of that call. A second process loads the code
    from a file beside the source, or in the user's cache folder; without either each compiles."""
    try:
        compiled: Any = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:
        # Neither the package's folder nor a home can be written: numba finds no place.
        compiled = numba.njit(nogil=True)(function)
    return cast(Callable[P, R], compiled)


def primitive(function: Callable[P, R]) -> Callable[P, R]:
    """A part of kernels, compiled into each of them."""
    compiled: Any = numba.njit(nogil=True)(function)
    return cast(Callable[P, R], compiled)
