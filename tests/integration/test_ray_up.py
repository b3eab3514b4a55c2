"""The shipped deploy/ray/on-prem.yaml, brought up by the real ``ray up`` over ssh.

Three nodes on loopback addresses, each with an sshd, a home and a process table of its own. Only
addresses, ports and paths of the shipped files are edited. What is not repeated here is the
installation: the nodes have this environment already, as after an earlier ``ray up``.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import getpass
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from baton import Client
from tests.support.sshd import SshClient, SshdCannotRun, SshNode, free_port, ssh_nodes

ROOT = Path(__file__).parents[2]
HEAD, PREFILL, DECODE = ADDRESSES = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
RAY = str(Path(sys.executable).parent / "ray")
BATON = "~/baton/venv/bin/python -m baton.cli"
UP_S, NODES_S, SERVING_S, STOP_S, GONE_S = 90.0, 90.0, 90.0, 40.0, 40.0
POLL_S = 1.0


@dataclass(frozen=True)
class Deployment:
    """``here``: the environment of whoever types ``ray up``."""

    ssh: SshClient
    nodes: list[SshNode]
    here: dict[str, str]
    yaml: Path
    grpc_address: str

    @property
    def head(self) -> SshNode:
        return self.nodes[0]

    def node(self, address: str) -> SshNode:
        (found,) = [node for node in self.nodes if node.address == address]
        return found

    def ray(self, *words: str, timeout_s: float) -> str:
        done = subprocess.run(
            [RAY, *words],
            cwd=ROOT,
            env=self.here,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture
def deployment(capfd: pytest.CaptureFixture[str]) -> Iterator[Deployment]:
    # Not pytest's folder: Ray puts sockets below it, whose paths may have 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="rayup-", dir="/tmp"))
    every_login = {
        "PYTHONPATH": str(ROOT),
        # A node gives a silent head up after a minute; here sooner.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    }
    try:
        with ssh_nodes(root, ADDRESSES, every_login) as (ssh, nodes):
            yield _deployment(root, ssh, nodes)
    except SshdCannotRun as exc:
        reason = f"`ray up` was NOT tested: no machine to ssh into. {exc}"
        with capfd.disabled():
            print(f"\n{reason}", flush=True)
        pytest.skip(reason)
    finally:
        shutil.rmtree(_control_folder(root.name), ignore_errors=True)
        shutil.rmtree(root)


def _deployment(root: Path, ssh: SshClient, nodes: list[SshNode]) -> Deployment:
    wheels, home = root / "dist", root / "here"
    wheels.mkdir()
    (wheels / "baton_serve-0.whl").write_text("stands for the wheel of an earlier `ray up`")
    (home / "tmp").mkdir(parents=True)
    for node in nodes:
        _install(node, wheels)
    grpc_port = free_port(ADDRESSES)
    placement = root / "cluster.yaml"
    placement.write_text(
        _edited(
            ROOT / "deploy/examples/on-prem.yaml",
            {"50051": str(grpc_port), "8000": str(free_port(ADDRESSES))},
        )
    )
    on_prem = root / "on-prem.yaml"
    on_prem.write_text(
        _edited(
            ROOT / "deploy/ray/on-prem.yaml",
            {
                "cluster_name: baton": f"cluster_name: {root.name}",
                "10.0.0.1": HEAD,
                "10.0.0.2": PREFILL,
                "10.0.0.3": DECODE,
                "ssh_user: ubuntu": f"ssh_user: {ssh.user}",
                "~/.ssh/id_ed25519": str(ssh.key),
                "deploy/examples/on-prem.yaml": str(placement),
                "wheels: dist": f"wheels: {wheels}",
                "6379": str(free_port(ADDRESSES)),
                # Here three nodes share ports, with other Rays of this machine, and would share
                # the sockets in Ray's folder: a worker takes the head's path where none is given.
                "ray start --head": f"ray start --head --dashboard-port={free_port(ADDRESSES)} "
                f"--ray-client-server-port={free_port(ADDRESSES)}",
                "bin/ray start": "bin/ray start --temp-dir=$RAY_TMPDIR/ray "
                "--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0",
            },
        )
    )
    here = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "RAY_TMPDIR": str(home / "tmp"),
        "PATH": f"{ssh.path}:{os.environ['PATH']}",
    }
    return Deployment(ssh, nodes, here, on_prem, f"127.0.0.1:{grpc_port}")


def _install(node: SshNode, wheels: Path) -> None:
    """What the setup commands of an earlier `ray up` with the same locks left."""
    digest = hashlib.sha256()
    for path in (ROOT / "requirements.lock", ROOT / "requirements-torch.lock", *wheels.iterdir()):
        digest.update(path.read_bytes())
    (node.home / "baton").mkdir()
    (node.home / "baton/installed").write_text(f"{digest.hexdigest()}  -\n")
    (node.home / "baton/venv").symlink_to(sys.prefix)


def _edited(path: Path, changes: dict[str, str]) -> str:
    text = path.read_text()
    for old, new in changes.items():
        assert old in text, f"{path.name} no longer says {old!r}"
        text = text.replace(old, new)
    return text


def _control_folder(cluster_name: str) -> Path:
    """Where Ray keeps the ssh connections of a cluster."""
    user, cluster = (
        hashlib.sha256(word.encode()).hexdigest()[:10] for word in (getpass.getuser(), cluster_name)
    )
    return Path("/tmp") / f"ray_ssh_{user}" / cluster


@contextlib.contextmanager
def _serving(deployment: Deployment) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """`baton serve` in a terminal on the head, as someone would type it; and what it printed."""
    typed = f"{BATON} serve -f ~/baton/cluster.yaml --ray-address auto --json 2> ~/serve.log"
    process = subprocess.Popen(
        deployment.ssh.command(deployment.head, typed, "-tt"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with concurrent.futures.ThreadPoolExecutor(1) as executor, process.stdout, process.stdin:
        first_line = executor.submit(process.stdout.readline)
        try:
            line = first_line.result(SERVING_S)
            assert line.startswith("{"), line + (deployment.head.home / "serve.log").read_text()
            yield process, json.loads(line)
        finally:
            process.kill()
            process.wait()


def _wait_until_active(deployment: Deployment) -> None:
    """Until every node has a raylet (cheap to see), and then until Ray counts them all."""
    until, said = time.monotonic() + NODES_S, "no raylet on some node"
    while time.monotonic() < until:
        if all(any("/raylet --" in _words(p) for p in n.processes()) for n in deployment.nodes):
            said = deployment.ray("exec", str(deployment.yaml), "ray status", timeout_s=NODES_S)
            if f"{len(deployment.nodes)} local.cluster.node" in said:
                return
        threading.Event().wait(POLL_S)
    logs = [path.read_text() for path in deployment.head.tmp.glob("ray/session_*/logs/monitor.*")]
    raise AssertionError("\n".join([f"not every node is active: {said}", *logs]))


def _title_and_parent(deployment: Deployment, node: SshNode, pid: int) -> tuple[str, str]:
    """The command lines of a process of that node and of what started it."""
    shown = deployment.ssh.run(
        node, f"ps -o args= -p {pid}; ps -o args= -p $(ps -o ppid= -p {pid})", STOP_S
    )
    title, parent = shown.splitlines()
    return title, parent


def _left(deployment: Deployment) -> list[str]:
    """What still runs on the nodes or holds a connection to them, when the grace is over."""
    control = str(_control_folder(deployment.yaml.parent.name))
    until = time.monotonic() + GONE_S
    while True:
        left = [process for node in deployment.nodes for process in node.processes()]
        left += [p for p in psutil.process_iter() if control in _words(p)]
        if not left or time.monotonic() > until:
            return [f"{process.pid} {_words(process)[:100]}" for process in left]
        psutil.wait_procs(left, timeout=POLL_S)


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.timeout(400)
def test_ray_up_serve_one_request_ray_down(deployment: Deployment) -> None:
    deployment.ray("get-auth-token", "--generate", timeout_s=UP_S)
    deployment.ray("up", "-y", str(deployment.yaml), timeout_s=UP_S)
    _wait_until_active(deployment)
    _assert_refused_without_the_token(deployment)

    with _serving(deployment) as (serve, described):
        assert described["router"]["grpc_address"] == deployment.grpc_address
        with Client(deployment.grpc_address) as client:
            completion = client.generate("import os\n", max_tokens=16, temperature=0.0)
        assert completion.text

        status = [sys.executable, "-m", "baton.cli", "status", "--json", "--address"]
        shown = subprocess.run(
            [*status, deployment.grpc_address],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=STOP_S,
        ).stdout
        workers = {worker["worker_id"]: worker for worker in json.loads(shown)["workers"]}
        assert {w: report["role"] for w, report in workers.items()} == {
            "prefill-0": "prefill",
            "decode-0": "decode",
        }
        assert workers["decode-0"]["kv_bytes_received"] > 0

        _assert_actors_of_this_cluster(deployment, described)
        assert serve.stdin is not None
        serve.stdin.write("\x03")
        serve.stdin.flush()
        ended = serve.wait(STOP_S)
        assert ended == 0, (deployment.head.home / "serve.log").read_text()

    deployment.ray("down", "-y", str(deployment.yaml), timeout_s=UP_S)
    assert _left(deployment) == []


def _assert_refused_without_the_token(deployment: Deployment) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        deployment.ssh.run(
            deployment.head,
            f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'0' * 64} ~/baton/venv/bin/ray status",
            STOP_S,
        )
    assert "AuthenticationError" in refused.value.stderr


def _assert_actors_of_this_cluster(deployment: Deployment, described: dict[str, Any]) -> None:
    """Each on the node that its pool is pinned to, started by that node's raylet."""
    gcs = f"--gcs-address={HEAD}:"
    on = {"prefill": PREFILL, "decode": DECODE}
    for worker in described["workers"]:
        address = on[worker["role"]]
        assert worker["address"].startswith(f"tcp://{address}:")
        title, raylet = _title_and_parent(deployment, deployment.node(address), worker["pid"])
        assert title.startswith("ray::WorkerActor")
        assert gcs in raylet
        assert f"--node_ip_address={address}" in raylet
    router = described["router"]["pid"]
    title, raylet = _title_and_parent(deployment, deployment.head, router)
    assert title.startswith("ray::RouterActor")
    assert gcs in raylet
