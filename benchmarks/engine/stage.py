"""Engine processes on their way to the measurement: installed, started, through the gate."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.answer import Setup
from benchmarks.engine.checkpoint import MAX_MODEL_LEN
from benchmarks.engine.engine_process import EngineFailed, EngineProcess, engine_process
from benchmarks.engine.environments import Unavailable, preload_paths, python_of
from benchmarks.engine.gate import TOLERANCES, GateRed, GateResult, check
from benchmarks.engine.report import EngineFacts, LeftOut
from benchmarks.engine.variants import (
    OURS,
    PLANS,
    REFERENCE,
    EnginePlan,
    Variant,
    process_environment,
    variants_of,
)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Options:
    """peer_folder: an environment a peer. scratch: checkpoint, caches and logs.
    Both absolute: processes run elsewhere."""

    peers: tuple[str, ...]
    dtypes: tuple[str, ...]
    num_threads: int
    repeats: int
    window_s: float
    patience_s: float
    seed: int
    quick: bool
    peer_folder: Path
    scratch: Path
    torch_pip_args: str

    pool_tokens: int = 131_072
    max_num_batched_tokens: int = 2_048
    max_num_seqs: int = 64

    @property
    def logs(self) -> Path:
        return self.scratch / "logs"


@dataclass(frozen=True, slots=True)
class Ready:
    variant: Variant
    process: EngineProcess
    facts: EngineFacts
    pool_bytes: int
    gate: GateResult


class Stage:
    """Opens engines one after the other; ``left_out`` says which are not there and why.

    Processes live as long as ``stack``; one that is left out ends at once.
    """

    def __init__(
        self, options: Options, checkpoint: Path, stack: contextlib.AsyncExitStack, tell: Tell
    ) -> None:
        self.left_out: list[LeftOut] = []
        self._options = options
        self._checkpoint = checkpoint
        self._stack = stack
        self._tell = tell

    async def open_all(self) -> list[Ready]:
        """Ours first, then the peers that can be had. Raises GateRed and EngineFailed for ours.

        What all are held against is transformers in float32 from our own environment: the gate
        needs no peer.
        """
        self._tell("starting transformers, whose tokens count in the gate")
        variant = Variant(REFERENCE, "float32", "dynamic")
        async with self._process(variant, sys.executable, {}, "reference") as reference:
            await reference.open(self._setup(variant))
            ready = [
                await self._open(variant, sys.executable, {}, reference)
                for variant in self._wanted(PLANS[OURS])
            ]
            for name in self._options.peers:
                ready += await self._open_peer(PLANS[name], reference)
        return ready

    async def _open_peer(self, plan: EnginePlan, reference: EngineProcess) -> list[Ready]:
        assert plan.environment is not None
        options = self._options
        log = options.logs / f"install-{plan.name}.log"
        try:
            python = await python_of(
                plan.environment,
                options.peer_folder,
                log,
                options.torch_pip_args,
                self._tell,
                may_install=not options.quick,
            )
        except Unavailable as exc:
            self._leave_out(plan.name, exc)
            return []
        ready = []
        for variant in self._wanted(plan):
            try:
                preload: dict[str, str] = {}
                if libraries := plan.preloads.get(variant.mode):
                    paths = await preload_paths(libraries, python, options.scratch, log)
                    preload["LD_PRELOAD"] = ":".join(paths)
                ready.append(await self._open(variant, str(python), preload, reference))
            except (Unavailable, EngineFailed, GateRed) as exc:
                self._leave_out(variant.name, exc)
        return ready

    async def _open(
        self, variant: Variant, python: str, preload: dict[str, str], reference: EngineProcess
    ) -> Ready:
        self._tell(f"starting {variant.name}")
        async with contextlib.AsyncExitStack() as trial:
            process = await trial.enter_async_context(
                self._process(variant, python, preload, variant.name)
            )
            found = await process.open(self._setup(variant))
            facts = EngineFacts(variant.engine, variant.name, found["versions"], found["load_s"])
            tolerance = TOLERANCES[variant.dtype]
            gate = await check(process, reference, self._options.seed, tolerance)
            self._stack.push_async_exit(trial.pop_all())
        return Ready(variant, process, facts, found["pool_bytes"], gate)

    def _process(
        self, variant: Variant, python: str, preload: dict[str, str], name: str
    ) -> contextlib.AbstractAsyncContextManager[EngineProcess]:
        options = self._options
        told = process_environment(variant, options.num_threads, str(options.scratch))
        log = options.logs / f"{name.replace(' ', '-')}.log"
        return engine_process(name, python, PLANS[variant.engine].module, told | preload, log)

    def _setup(self, variant: Variant) -> Setup:
        options = self._options
        return Setup(
            checkpoint=str(self._checkpoint),
            dtype=variant.dtype,
            mode=variant.mode,
            num_threads=options.num_threads,
            pool_tokens=options.pool_tokens,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_num_seqs=options.max_num_seqs,
        )

    def _wanted(self, plan: EnginePlan) -> list[Variant]:
        options = self._options
        return [v for v in variants_of(plan, quick=options.quick) if v.dtype in options.dtypes]

    def _leave_out(self, name: str, why: Exception) -> None:
        self._tell(f"left out: {name}: {why}")
        self.left_out.append(LeftOut(name, str(why)))
