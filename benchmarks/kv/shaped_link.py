"""A network link of a given rate between this process and another on the same machine.

Where root allows it, a pair of virtual Ethernet devices with the other end in a network namespace
of its own, shaped by the kernel's token bucket (``tc tbf``): real TCP, and 10 Gbit/s hold. Only
what goes to the far end is shaped, so that answers do not wait.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

NEAR, FAR = "10.199.77.1", "10.199.77.2"
BURST_S, MIN_BURST = 1e-3, 16_384
QUEUE_S = 0.1
"""Of the link's rate, before the kernel drops: TCP then sends again."""


@dataclass(frozen=True, slots=True)
class ShapedLink:
    """near, far: addresses of both ends. prefix: what a command of the far end begins with."""

    near: str
    far: str
    prefix: tuple[str, ...]
    device: str

    def set_rate(self, bytes_per_s: float | None) -> None:
        """From now on; None is as fast as it goes."""
        delete = ["tc", "qdisc", "del", "dev", self.device, "root"]
        if bytes_per_s is None:
            subprocess.run(delete, capture_output=True, check=False)
            return
        burst = int(max(MIN_BURST, bytes_per_s * BURST_S))
        limit = int(burst + bytes_per_s * QUEUE_S)
        shape = f"rate {int(bytes_per_s * 8)}bit burst {burst}b limit {limit}b"
        _run("tc", "qdisc", "replace", "dev", self.device, "root", "tbf", *shape.split())


@contextlib.contextmanager
def shaped_link() -> Iterator[ShapedLink]:
    """Raises OSError or CalledProcessError where that is not allowed."""
    name = f"bkv{os.getpid()}"
    near, far = f"{name}n"[-15:], f"{name}f"[-15:]
    _run("ip", "netns", "add", name)
    try:
        _run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        _run("ip", "addr", "add", f"{NEAR}/30", "dev", near)
        _run("ip", "link", "set", near, "up")
        inside = ("ip", "netns", "exec", name)
        _run(*inside, "ip", "addr", "add", f"{FAR}/30", "dev", far)
        _run(*inside, "ip", "link", "set", far, "up")
        _run(*inside, "ip", "link", "set", "lo", "up")
        yield ShapedLink(NEAR, FAR, inside, near)
    finally:
        subprocess.run(["ip", "link", "del", near], capture_output=True, check=False)
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
