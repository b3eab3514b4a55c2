"""Where a result came from: commit, versions, hardware. Names no path and no host."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil

PACKAGES = ("torch", "numpy", "numba", "pyzmq", "msgspec", "msgpack", "grpcio", "tokenizers")
ROOT = Path(__file__).resolve().parents[1]


class Hardware(msgspec.Struct, frozen=True):
    cpu: str
    num_cpus: int
    memory_gib: float


class Provenance(msgspec.Struct, frozen=True):
    """``commit`` ends in ``-dirty`` when tracked files differed from it, "" outside of git."""

    commit: str
    python: str
    system: str
    packages: dict[str, str]
    hardware: Hardware


def provenance() -> Provenance:
    return Provenance(
        commit=_commit(),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}",
        packages={name: version(name) for name in PACKAGES},
        hardware=Hardware(
            cpu=_cpu_name(),
            num_cpus=len(os.sched_getaffinity(0)),
            memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        ),
    )


def slug(hardware: Hardware) -> str:
    """For file names: ``2x-amd-epyc``."""
    name = re.sub(r"\(r\)|\(tm\)|processor|cpu|@.*", " ", hardware.cpu.lower())
    return "-".join([f"{hardware.num_cpus}x", *re.findall(r"[a-z0-9]+", name)])


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        is_dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if is_dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()
