"""Write the Python code of baton/api/v1/baton.proto, always with the same compiler.

    python tools/generate_proto.py          # writes baton/api/v1/baton_pb2*.py*

Generated code runs under its compiler's protobuf and grpcio or newer ones, so the pinned
compiler is what sets the floor for users of the SDK. It gets a virtual environment of its
own for the moment: it needs an older protobuf than the rest of the project.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

GRPCIO_TOOLS = "grpcio-tools==1.76.0"
"""Generates for protobuf >= 6.31.1 and grpcio >= 1.76.0: the floors in baton-client."""

ROOT = Path(__file__).resolve().parent.parent
PROTO = "baton/api/v1/baton.proto"


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="baton-proto-") as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", GRPCIO_TOOLS], check=True)
        subprocess.run(
            [
                python,
                *("-m", "grpc_tools.protoc", "--proto_path=.", "--python_out=."),
                *("--pyi_out=.", "--grpc_python_out=.", PROTO),
            ],
            check=True,
            cwd=ROOT,
        )
    print(f"wrote the code of {PROTO}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
