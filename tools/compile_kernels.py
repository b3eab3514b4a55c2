"""Compile every Triton kernel, the engine's and the KV codecs', for a GPU that need not be here.

    python -m tools.compile_kernels            # to machine code: registers, spills, shared memory
    python -m tools.compile_kernels --front    # Triton's own checks only; a few seconds

The interpreter runs kernels as Python and accepts much that the compiler refuses; and a tile that
spills registers, or outgrows shared memory, is found here before a GPU is. Exits with 1 when a
kernel in half precision spills or needs more shared memory than a block has.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before triton is imported: interpreted functions cannot be compiled.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from baton.engine.kernels.registry import TRITON
from benchmarks.kernel_cases import CaseMaker, Sizes
from tools.codec_kernel_cases import codec_variants

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_MEMORY_BYTES = 232_448
"""Of a block on Hopper."""
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Few rows, real widths: widths are what is compiled in.
SIZES = Sizes(rows=128, batch=4, context=64, chunk=16, suffix=16, layers=1, inner=256, hidden=2048)


@dataclass(frozen=True)
class Usage:
    kernel: str
    registers: int
    spill_bytes: int
    shared_bytes: int


class NoDevice:
    """What Triton asks a driver for when it compiles and does not launch."""

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def run_instead_of_launching(found: list[Usage], *, front: bool) -> None:
    """From now on a launch compiles for ``HOPPER`` and notes what the kernel uses."""
    driver.set_active(NoDevice())
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel is not None and not front:
            found.append(usage_of(self.__name__, kernel))

    def check(self: Any, key: Any, signature: Any, device: Any, constexprs: Any, options: Any,
              attrs: Any, warmup: bool) -> None:  # fmt: skip
        source = self.ASTSource(self, signature, constexprs, attrs)
        backend = make_backend(HOPPER)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        source.make_ir(
            HOPPER, options, backend.get_codegen_implementation(options),
            backend.get_module_map(), context,
        )  # fmt: skip
        found.append(Usage(self.__name__, 0, 0, 0))

    JITFunction.run = run
    if front:
        JITFunction._do_compile = check


def usage_of(name: str, kernel: Any) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert match is not None, printed
    return Usage(name, int(match[1]), int(match[2]), kernel.metadata.shared)


def attention(
    dtype: torch.dtype, group: int, dim: int, window: int | None, soft_cap: float | None
) -> None:
    def zeros(*shape: int, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=kind)

    q, blocks = zeros(64, 8 * group, dim, kind=dtype), zeros(4, 16, 8, dim, kind=dtype)
    kv, masks = (blocks, blocks), {"scale": 0.1, "soft_cap": soft_cap}
    tables, lengths = zeros(64, 8), zeros(64)
    TRITON.paged_decode_attention(q, *kv, tables, lengths, window=window, **masks)
    TRITON.paged_prefill_attention(
        q, *kv, tables[:1], zeros(2), lengths[:1], window=window, **masks
    )
    if window is None:
        TRITON.shared_prefix_decode_attention(
            q, *kv, tables, lengths, lengths, lengths, zeros(2), **masks
        )


def variants() -> Iterator[str]:
    """Compiles one after the other; yields what was just compiled."""
    for case in CaseMaker(TRITON, torch.device("cpu"), SIZES).all():
        case.run()
        yield f"{case.name}, bfloat16"
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for group, dim, window, soft_cap in (
            (4, 128, 4096, None),
            (4, 128, None, 50.0),
            (1, 64, None, None),
            (3, 96, None, None),
            (2, 256, 4096, 50.0),
        ):
            attention(dtype, group, dim, window, soft_cap)
            yield f"attention, {dtype}, group {group}, head_dim {dim}, {window=}, {soft_cap=}"
    yield from codec_variants()


def main() -> int:
    front = "--front" in sys.argv[1:]
    found: list[Usage] = []
    run_instead_of_launching(found, front=front)
    num_kernels, is_over = 0, False
    for label in variants():
        print(label, flush=True)
        for usage in found:
            num_kernels += 1
            over = usage.spill_bytes > 0 or usage.shared_bytes > SHARED_MEMORY_BYTES
            is_over |= over and "float32" not in label
            if not front:
                print(
                    f"  {usage.kernel:28} {usage.registers:4} registers  {usage.spill_bytes:4} "
                    f"bytes spilled  {usage.shared_bytes:7,} bytes shared{'  OVER' * over}"
                )
        found.clear()
    print(f"{num_kernels} kernels compiled for {HOPPER.backend} {HOPPER.arch}")
    return int(is_over)


if __name__ == "__main__":
    raise SystemExit(main())
