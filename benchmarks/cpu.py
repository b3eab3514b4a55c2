"""Who used the processors: the measured deployment, the client, and everybody else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import psutil


@dataclass(frozen=True, slots=True)
class CpuSnapshot:
    """Processor seconds used so far: by the whole machine, and by named groups of processes."""

    capacity_s: float
    busy_s: float
    of_group_s: Mapping[str, float]


def snapshot(groups: Mapping[str, tuple[int, ...]]) -> CpuSnapshot:
    """``groups``: process ids by name. A process that has ended counts as having used nothing."""
    times = psutil.cpu_times()
    # Linux counts guest time inside user time; idle and iowait are nobody's work.
    fields = times._asdict()
    capacity = sum(v for k, v in fields.items() if k not in ("guest", "guest_nice"))
    idle = fields["idle"] + fields.get("iowait", 0.0)
    return CpuSnapshot(
        capacity_s=capacity,
        busy_s=capacity - idle,
        of_group_s={name: sum(map(_used_s, pids)) for name, pids in groups.items()},
    )


def shares(before: CpuSnapshot, after: CpuSnapshot) -> dict[str, float]:
    """Of the whole machine between two snapshots, 1 = all processors; ``foreign`` is the rest."""
    capacity_s = max(after.capacity_s - before.capacity_s, 1e-9)
    found = {
        name: (used_s - before.of_group_s[name]) / capacity_s
        for name, used_s in after.of_group_s.items()
    }
    busy = (after.busy_s - before.busy_s) / capacity_s
    return {**found, "foreign": max(0.0, busy - sum(found.values())), "busy": busy}


def _used_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
