"""Compile this folder's C++ into one shared library, once per machine and version of the code.

The library has a plain C interface: no header of torch or Python is needed, a compiler is all,
and compiling takes seconds.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMPILERS = ("g++", "c++")
FLAGS = (
    "-std=gnu++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-pthread",
    "-fPIC",
    "-shared",
)
COMPILE_TIMEOUT_S = 300
_SHOWN_ERROR_LINES = 8


class CannotCompile(Exception):
    """No compiler, or one that failed. The message says what to install or what it printed."""


def library_path(cache: Path | None = None) -> Path:
    """The compiled library, built when no earlier start of this version on this machine has.

    cache: folder for compiled libraries; ``~/.cache/baton/kernels`` by default. Processes that
    start together wait for the first one. Raises CannotCompile.
    """
    compiler = _compiler()
    try:
        folder = cache or Path.home() / ".cache" / "baton" / "kernels"
        target = folder / f"kernels-{_fingerprint(compiler)}.so"
        if target.exists():
            return target
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(folder / "lock"):
            if not target.exists():
                _compile(compiler, target)
    except (OSError, RuntimeError) as exc:
        # Path.home() raises RuntimeError for a user without a home.
        raise CannotCompile(f"the folder for compiled kernels cannot be used: {exc}") from exc
    except subprocess.TimeoutExpired as exc:
        raise CannotCompile(f"{compiler} took longer than {COMPILE_TIMEOUT_S} s") from exc
    return target


def _compiler() -> str:
    for name in COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise CannotCompile(
        f"no C++ compiler on PATH (looked for {', '.join(COMPILERS)}); "
        "on Debian and Ubuntu install the package g++"
    )


def _sources() -> list[Path]:
    return sorted(p for p in Path(__file__).parent.iterdir() if p.suffix in (".cpp", ".h"))


def _fingerprint(compiler: str) -> str:
    """Of everything that the machine code depends on: sources, flags, compiler, processor."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, timeout=COMPILE_TIMEOUT_S, check=False
    ).stdout
    digest.update(" ".join(FLAGS).encode() + b"\0" + version + b"\0" + _processor())
    return digest.hexdigest()[:24]


def _processor() -> bytes:
    """What ``-march=native`` looks at: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    known = ("flags", "Features", "model name", "CPU part")
    return "\n".join(dict.fromkeys(x for x in lines if x.startswith(known))).encode()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, target: Path) -> None:
    unfinished = target.with_suffix(f".{os.getpid()}")
    sources = [str(p) for p in _sources() if p.suffix == ".cpp"]
    try:
        done = subprocess.run(
            [compiler, *FLAGS, *sources, "-o", str(unfinished)],
            capture_output=True,
            text=True,
            timeout=COMPILE_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            shown = "\n".join(done.stderr.splitlines()[:_SHOWN_ERROR_LINES])
            raise CannotCompile(f"{compiler} failed with status {done.returncode}:\n{shown}")
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
