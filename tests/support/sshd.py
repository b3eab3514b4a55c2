"""Machines to ssh into, all of them this one: an sshd of its own per loopback address.

Each ``SshNode`` has a home, a temporary folder and a process table of its own, so that a
command that stops "every such process on this machine" stays within its node. Nothing of
the user's own ssh is read or written.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

UNSHARE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
OWN_PROCESS_TABLE = ("setpriv", "--pdeathsig", "KILL", *UNSHARE)
"""util-linux; needs root, for in a user namespace sshd cannot hand out terminals. A node's
processes end with its sshd, and that with whoever started it, however that ends."""
CONNECT_TIMEOUT_S = 10.0
CONNECT_POLL_S = 0.1
PROGRAMS = ("ssh", "ssh-keygen", "rsync", "sshd", "setpriv", "unshare")


class SshdCannotRun(Exception):
    """Why there can be no such machine here, in words for whoever reads a skipped test."""


@dataclass(frozen=True)
class SshNode:
    address: str
    port: int
    home: Path
    tmp: Path
    sshd: psutil.Process

    def processes(self) -> list[psutil.Process]:
        """What runs on this node beside its sshd. All of it descends from sshd: orphans too are
        handed to the first process of the node's own table."""
        listener, *_ = self.sshd.children()
        return [p for p in listener.children(recursive=True) if _is_alive(p)]


@dataclass(frozen=True)
class SshClient:
    """``path``: a folder whose ``ssh`` knows the port and the key; put it first on PATH."""

    user: str
    key: Path
    path: Path

    def command(self, node: SshNode, remote: str, *options: str) -> list[str]:
        return [str(self.path / "ssh"), *options, f"{self.user}@{node.address}", remote]

    def run(self, node: SshNode, remote: str, timeout_s: float, *options: str) -> str:
        """What it printed. Raises CalledProcessError and TimeoutExpired."""
        return subprocess.run(
            self.command(node, remote, *options),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=True,
            timeout=timeout_s,
        ).stdout


def _check_process_tables() -> None:
    done = subprocess.run([*OWN_PROCESS_TABLE, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SshdCannotRun(
            "nodes would share the processes of this machine, and `ray stop` on one would end "
            f"every Ray here; `{' '.join(OWN_PROCESS_TABLE)}` needs root: {done.stderr.strip()}"
        )


@contextlib.contextmanager
def ssh_nodes(
    root: Path, addresses: list[str], environment: dict[str, str]
) -> Iterator[tuple[SshClient, list[SshNode]]]:
    """One node per address, with the environment that every login there has. ``root``: an empty
    folder with a short path (sockets lie below it). Raises SshdCannotRun."""
    programs = {name: _find(name) for name in PROGRAMS}
    missing = [name for name, found in programs.items() if found is None]
    if missing:
        raise SshdCannotRun(
            f"not installed: {', '.join(missing)} (openssh-server, rsync, util-linux)"
        )
    _check_process_tables()
    port = free_port(addresses)
    client = _client(root, port, str(programs["ssh"]))
    with contextlib.ExitStack() as stack:
        nodes = []
        for address in addresses:
            place = root / address
            home, tmp = place / "home", place / "tmp"
            home.mkdir(parents=True)
            tmp.mkdir()
            (home / ".bashrc").write_text(f'export PATH="{client.path}:$PATH"\n')
            shown = {**environment, "HOME": str(home), "TMPDIR": str(tmp), "RAY_TMPDIR": str(tmp)}
            config = _sshd_config(place, client, address, port, shown)
            daemon = stack.enter_context(_running(str(programs["sshd"]), config))
            nodes.append(SshNode(address, port, home, tmp, daemon))
        for node in nodes:
            _wait_until_usable(client, node)
        yield client, nodes


def free_port(addresses: list[str]) -> int:
    """A TCP port that nothing has on any of the addresses. Raises SshdCannotRun."""
    with contextlib.ExitStack() as stack:
        port = 0
        for address in addresses:
            held = stack.enter_context(socket.socket())
            try:
                held.bind((address, port))
            except OSError as exc:
                raise SshdCannotRun(f"{address} cannot be bound here: {exc}") from exc
            port = held.getsockname()[1]
        return port


def _find(program: str) -> str | None:
    # sshd is in sbin, which an ordinary user's PATH leaves out.
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _client(root: Path, port: int, ssh: str) -> SshClient:
    key, path = root / "user_key", root / "bin"
    path.mkdir()
    _new_key(key)
    config = root / "ssh_config"
    config.write_text(
        f"Host *\n  Port {port}\n  IdentityFile {key}\n  IdentitiesOnly yes\n"
        "  StrictHostKeyChecking no\n  UserKnownHostsFile /dev/null\n"
        "  BatchMode yes\n  LogLevel ERROR\n"
    )
    wrapper = path / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {ssh} -F {config} "$@"\n')
    wrapper.chmod(0o755)
    return SshClient(user=getpass.getuser(), key=key, path=path)


def _new_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(command, check=True, capture_output=True, timeout=CONNECT_TIMEOUT_S)


def _sshd_config(
    place: Path, client: SshClient, address: str, port: int, environment: dict[str, str]
) -> Path:
    host_key = place / "host_key"
    _new_key(host_key)
    if os.geteuid() == 0:
        # sshd refuses to start as root without it; packages leave it to the service manager.
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    shown = " ".join(f'"{name}={value}"' for name, value in environment.items())
    config = place / "sshd_config"
    config.write_text(
        f"ListenAddress {address}\nPort {port}\nHostKey {host_key}\n"
        f"AuthorizedKeysFile {client.key}.pub\nStrictModes no\nPidFile none\n"
        "UsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        "PermitRootLogin prohibit-password\nMaxStartups 100\nMaxSessions 100\n"
        f"SetEnv {shown}\n"
    )
    return config


@contextlib.contextmanager
def _running(sshd: str, config: Path) -> Iterator[psutil.Process]:
    command = [*OWN_PROCESS_TABLE, sshd, "-D", "-e", "-f", str(config)]
    with (config.parent / "sshd.log").open("wb") as log:
        started = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    process = psutil.Process(started.pid)
    try:
        yield process
    finally:
        # unshare shrugs off SIGTERM, and there is nothing to save.
        node = process.children(recursive=True)
        started.kill()
        started.wait()
        psutil.wait_procs(node, timeout=CONNECT_TIMEOUT_S)


def _wait_until_usable(client: SshClient, node: SshNode) -> None:
    pause = threading.Event()
    for _ in range(int(CONNECT_TIMEOUT_S / CONNECT_POLL_S)):
        with contextlib.suppress(OSError), socket.create_connection((node.address, node.port), 1):
            break
        if not node.sshd.is_running() or node.sshd.status() == psutil.STATUS_ZOMBIE:
            break
        pause.wait(CONNECT_POLL_S)
    try:
        # With a terminal, as Ray logs in.
        home = client.run(node, "echo $HOME", CONNECT_TIMEOUT_S, "-tt").strip()
    except subprocess.SubprocessError as exc:
        log = (node.home.parent / "sshd.log").read_text()
        said = getattr(exc, "stderr", "") or ""
        raise SshdCannotRun(f"no login at {node.address}: {exc}\n{said}\nsshd: {log}") from exc
    if home != str(node.home):
        raise SshdCannotRun(f"this sshd does not honour SetEnv HOME: it is {home!r}")


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
