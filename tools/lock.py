"""Writes the lock files from pyproject.toml: ``make lock`` (``--upgrade`` takes newer versions).

``requirements.lock`` and ``requirements-dev.lock`` pin every package with hashes, for Python
3.11 and 3.12 alike. torch and what only some builds of it need stay out: the CPU and the CUDA
build carry one version number and different hashes. ``requirements-torch.lock`` pins the
version alone; see docs/adr/0003-lock-files.md. Triton, which CUDA builds of torch bring, is a
package of our own choice among the developers' ones: tests interpret its kernels on a CPU.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_LOCK = ROOT / "requirements-torch.lock"
BUILD_SPECIFIC = {
    "requirements.lock": re.compile(r"^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=="),
    "requirements-dev.lock": re.compile(r"^(torch|nvidia-[a-z0-9-]+|cuda-[a-z0-9-]+)=="),
}
HEADER = (
    "# Written by `make lock`. Install with: pip install --require-hashes --no-deps -r {name}\n"
)


def compile_requirements(extras: list[str], previous: Path, upgrade: bool) -> str:
    """All pins with hashes, torch included, as uv prints them. Keeps the pins of ``previous``."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.txt"
        if previous.exists() and not upgrade:
            output.write_text(previous.read_text() + TORCH_LOCK.read_text())
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--quiet"]
        command += ["--universal", "--python-version", "3.11", "--generate-hashes"]
        command += ["--no-header", "--no-emit-index-url", "--no-emit-find-links"]
        command += ["--annotation-style", "line", "--output-file", str(output)]
        command += [word for extra in extras for word in ("--extra", extra)]
        subprocess.run(command, cwd=ROOT, check=True)
        return output.read_text()


def without_build_specific(name: str, compiled: str) -> str:
    """Drop the blocks (a pin and its indented hashes) of torch and of its build's own packages."""
    blocks = re.split(r"^(?=[A-Za-z0-9])", compiled, flags=re.MULTILINE)
    return "".join(block for block in blocks if not BUILD_SPECIFIC[name].match(block))


def main() -> int:
    upgrade = "--upgrade" in sys.argv[1:]
    for name, extras in (("requirements.lock", []), ("requirements-dev.lock", ["dev"])):
        path = ROOT / name
        compiled = compile_requirements(extras, path, upgrade)
        path.write_text(HEADER.format(name=name) + without_build_specific(name, compiled))
        torch_pin = re.search(r"^torch==\S+", compiled, flags=re.MULTILINE)
        if torch_pin is None:
            wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
            raise SystemExit(f"error: no torch among the resolved packages; asked for {wanted}")
        TORCH_LOCK.write_text(
            "# Pinned, not hashed: CPU and CUDA builds share this version number.\n"
            f"{torch_pin.group()}\n"
        )
        print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
