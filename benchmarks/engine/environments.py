"""An environment of its own for every peer: made once, found again, never needed by ours.

What cannot be made raises ``Unavailable`` with the reason, and the run goes on without it.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
"""The version that ours is measured with, so that both sit on the same matrix library."""
INSTALL_TIMEOUT_S = 1_800.0

VLLM_PRELOADS = ("libtcmalloc_minimal.so.4", "libiomp5.so")
"""What vLLM's installation guide says to load before it on x86."""
TCMALLOC_PACKAGE = "libtcmalloc-minimal4"

Tell = Callable[[str], None]


class Unavailable(Exception):
    """This peer, or this way to start it, cannot be had here; the text says why."""


@dataclass(frozen=True, slots=True)
class PeerEnvironment:
    """package, version: what decides whether an environment is the right one.

    unwanted: packages that come with it and break it. bare: further ones, each with its version,
    that are installed without what they ask for.
    """

    name: str
    package: str
    version: str
    unwanted: tuple[str, ...] = ()
    bare: tuple[tuple[str, str], ...] = ()


async def python_of(
    environment: PeerEnvironment,
    folder: Path,
    log: Path,
    torch_pip_args: str,
    tell: Tell,
    *,
    may_install: bool,
) -> Path:
    """The interpreter of ``folder/<name>``, made and filled first where it is not there yet."""
    home = folder / environment.name
    python = home / "bin" / "python"
    if python.exists() and await _has(python, environment):
        return python
    if not may_install:
        raise Unavailable(f"not installed in {home.name}/; run without --quick to install it")
    wanted = f"{environment.package}=={environment.version}"
    extra = shlex.split(torch_pip_args)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    steps: list[tuple[str, list[str]]] = [
        ("an environment", [sys.executable, "-m", "venv", str(home)]),
        (TORCH, [*pip, "install", "-q", *extra, TORCH]),
        (wanted, [*pip, "install", "-q", *extra, TORCH, wanted]),
    ]
    if environment.unwanted:
        said = "nothing of " + ", ".join(environment.unwanted)
        steps.append((said, [*pip, "uninstall", "-q", "-y", *environment.unwanted]))
    if environment.bare:
        bare = [f"{package}=={version}" for package, version in environment.bare]
        steps.append((", ".join(bare), [*pip, "install", "-q", "--no-deps", *bare]))
    for number, (what, command) in enumerate(steps):
        tell(f"{environment.name}: [{number + 1}/{len(steps)}] installing {what}")
        if await _run(command, log) != 0:
            raise Unavailable(f"installing {what} failed: {_last_line(log)}")
    if not await _has(python, environment):
        raise Unavailable(f"{wanted} is not in its environment after the installation")
    return python


async def preload_paths(names: Sequence[str], python: Path, scratch: Path, log: Path) -> list[str]:
    """Where the shared libraries lie: in the environment, on the system, or fetched here."""
    found = []
    for name in names:
        path = _library(name, python.parent.parent)
        if path is None and name.startswith("libtcmalloc"):
            path = await _fetched_tcmalloc(name, scratch / "tcmalloc", log)
        if path is None:
            raise Unavailable(f"{name} is not here; Debian and Ubuntu: install {TCMALLOC_PACKAGE}")
        found.append(str(path))
    return found


def _library(name: str, home: Path) -> Path | None:
    folders = [home / "lib", *map(Path, ("/usr/lib", "/usr/lib64", "/usr/local/lib"))]
    folders += sorted(Path("/usr/lib").glob("*-linux-gnu"))
    return next((f / name for f in folders if (f / name).exists()), None)


async def _fetched_tcmalloc(name: str, folder: Path, log: Path) -> Path | None:
    """Unpacked from the system's package without installing it; None where that cannot be."""
    if found := _unpacked(name, folder):
        return found
    place = shlex.quote(str(folder))
    script = f"mkdir -p {place} && cd {place} && apt-get download -q {TCMALLOC_PACKAGE}"
    done = await _run(["sh", "-c", f"{script} && dpkg -x *.deb ."], log)
    return _unpacked(name, folder) if done == 0 else None


def _unpacked(name: str, folder: Path) -> Path | None:
    return next(folder.resolve().rglob(name), None)


async def _has(python: Path, environment: PeerEnvironment) -> bool:
    wanted = {environment.package: environment.version, **dict(environment.bare)}
    code = (
        "from importlib.metadata import version; "
        f"assert all(version(k) == v for k, v in {wanted!r}.items()); import torch"
    )
    return await _run([str(python), "-c", code], None) == 0


async def _run(command: Sequence[str], log: Path | None) -> int:
    """Exit status. Whatever it started ends with it, also when this is interrupted."""
    with (log or Path(os.devnull)).open("ab") as output:
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        except FileNotFoundError:
            return 127
        try:
            return await asyncio.wait_for(process.wait(), INSTALL_TIMEOUT_S)
        except TimeoutError:
            return 124
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if line.lower().startswith("error")]
    said = [line for line in errors or lines if line]
    return said[-1] if said else "it said nothing"
