"""``baton serve`` as a user runs it: serves, answers, drains on Ctrl-C, leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "deploy" / "examples" / "local.yaml"
DEADLINE_S = 120.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def config(folder: Path, *, grpc_port: int = 0) -> Path:
    """The example on free ports."""
    text = EXAMPLE.read_text()
    assert "grpc_port: 50051" in text
    assert "http_port: 8000" in text
    text = text.replace("grpc_port: 50051", f"grpc_port: {grpc_port}")
    path = folder / "local.yaml"
    path.write_text(text.replace("http_port: 8000", "http_port: 0"))
    return path


def baton(*args: str) -> list[str]:
    return [sys.executable, "-m", "baton.cli", *args]


def test_serve_answers_and_ctrl_c_ends_everything(tmp_path: Path) -> None:
    command = baton("serve", "-f", str(config(tmp_path)), "--launcher", "process", "--json")
    with (tmp_path / "err").open("w+") as err:
        server = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=err, text=True, env=ENVIRONMENT
        )
        try:
            assert server.stdout is not None
            described = json.loads(server.stdout.readline())
            address = described["router"]["grpc_address"]
            assert {worker["role"] for worker in described["workers"]} == {"prefill", "decode"}
            family = psutil.Process(server.pid).children(recursive=True)
            assert {p.pid for p in family} >= {w["pid"] for w in described["workers"]}

            answer_of = ("--max-tokens", "12", "--temperature", "0", "--json")
            first, second = (
                subprocess.run(
                    baton("complete", "import ", *answer_of, "--address", address),
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                    check=True,
                    timeout=DEADLINE_S,
                )
                for _ in range(2)
            )
            answers = [json.loads(done.stdout)["choices"][0] for done in (first, second)]
            assert answers[0]["text"]
            assert answers[0]["text"] == answers[1]["text"]
            hops = [span["name"] for span in answers[0]["timeline"]["spans"]]
            assert hops == ["queued", "prefill", "first_token", "transfer", "decode"]

            server.send_signal(signal.SIGINT)
            server.communicate(timeout=DEADLINE_S)
        finally:
            server.kill()
            server.wait()
        err.seek(0)
        said = err.read()
    assert server.returncode == 0, said
    assert "Traceback" not in said
    assert said.rstrip().endswith("stopped")
    assert [p for p in family if p.is_running()] == []


def test_port_in_use_is_one_line_with_the_way_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            baton("serve", "-f", str(config(tmp_path, grpc_port=port)), "--launcher", "process"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_S,
            env=ENVIRONMENT,
        )
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"127.0.0.1:{port}" in error
    assert "Choose another, or 0" in error
