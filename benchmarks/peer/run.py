"""The run from end to end: systems up, gate, windows, transfers."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.client import Choice
from benchmarks.engine.checkpoint import CONFIG, SEED, make_checkpoint, num_parameters
from benchmarks.engine.engine_process import EngineFailed
from benchmarks.engine.environments import (
    VLLM_PRELOADS,
    Unavailable,
    preload_paths,
    python_of,
)
from benchmarks.engine.measure import Patience
from benchmarks.engine.report import LeftOut
from benchmarks.peer.cases import REQUESTS, Case, num_requests
from benchmarks.peer.client_process import Client, client_process
from benchmarks.peer.gate import GateRed, Passage, check, expected
from benchmarks.peer.measure import measure
from benchmarks.peer.report import FORMAT_VERSION, Result, Settings
from benchmarks.peer.results import ratios, summarise, transfer_verdicts
from benchmarks.peer.serve_baton import serve_baton
from benchmarks.peer.serve_vllm import ENVIRONMENT, VllmPlan, serve_vllm
from benchmarks.peer.systems import (
    NUM_WORKERS,
    OURS,
    PEER,
    Shape,
    System,
    Tell,
)
from benchmarks.peer.transfer import Transfer, transfer
from benchmarks.provenance import provenance

ATTEMPTS = 3
NUM_TRANSFERS = 20


@dataclass(frozen=True, slots=True)
class Options:
    """starts: of the peer. shapes: which deployments. scratch: checkpoint, caches and logs."""

    starts: tuple[str, ...]
    shapes: tuple[Shape, ...]
    repeats: int
    patience_s: float
    seed: int
    quick: bool
    preload: bool
    peer_folder: Path
    scratch: Path
    torch_pip_args: str

    @property
    def logs(self) -> Path:
        return self.scratch / "logs"


async def run(options: Options, tell: Tell) -> Result:
    """Raises GateRed and EngineFailed. A peer that cannot be installed is left out and named."""
    origin = provenance()
    measured_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    shutil.rmtree(options.logs, ignore_errors=True)
    options.logs.mkdir(parents=True)
    cores = tuple(sorted(os.sched_getaffinity(0))[:NUM_WORKERS])
    if len(cores) < NUM_WORKERS:
        raise EngineFailed(f"{NUM_WORKERS} processors are needed, one a worker; here is 1")
    tell("making the checkpoint (32 million random weights)")
    checkpoint = make_checkpoint(options.scratch / "checkpoint")
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(client_process())
        stage = _Stage(options, checkpoint, cores, client, stack, tell)
        ours, peers = await stage.open_all()
        systems = [*ours, *peers]
        tell(f"gate green; {len(systems)} systems are up, and stopped but for their turns")
        windows = await measure(
            systems,
            client,
            repeats=options.repeats,
            seed=options.seed,
            quick=options.quick,
            patience=Patience(options.patience_s, ATTEMPTS),
            tell=tell,
        )
        tell("moving the KV of single prompts")
        transfers = await _transfers(systems, client, options)
        tell("done; ending what was started")
    made = summarise(windows, systems)
    return Result(
        version=FORMAT_VERSION,
        measured_at=measured_at,
        provenance=origin,
        settings=Settings(
            repeats=options.repeats,
            seed=options.seed,
            quick=options.quick,
            requests={c: num_requests(Case(0, c), quick=options.quick) for c in REQUESTS},
            peer_versions={
                ENVIRONMENT.package: ENVIRONMENT.version,
                **{name: version for name, version in ENVIRONMENT.bare if name != "orjson"},
            },
            peer_preload=options.preload,
        ),
        checkpoint={"seed": SEED, "parameters": num_parameters(), **CONFIG},
        systems=tuple(system.name for system in systems),
        left_out=tuple(stage.left_out),
        gate=tuple(stage.passages),
        summaries=tuple(made),
        ratios=tuple(ratios(made, ours, peers)),
        transfers=tuple(transfers),
        transfer_verdicts=tuple(transfer_verdicts(transfers, f"{OURS} 1P+1D")),
        windows=tuple(windows),
    )


async def _transfers(systems: list[System], client: Client, options: Options) -> list[Transfer]:
    count = 3 if options.quick else NUM_TRANSFERS
    split = [system for system in systems if system.shape == "1P+1D"]
    return [await transfer(system, client, count, options.seed) for system in split]


class _Stage:
    """Opens systems one after the other; each is stopped as soon as it passed the gate."""

    def __init__(
        self,
        options: Options,
        checkpoint: Path,
        cores: tuple[int, ...],
        client: Client,
        stack: contextlib.AsyncExitStack,
        tell: Tell,
    ) -> None:
        self.left_out: list[LeftOut] = []
        self.passages: list[Passage] = []
        self._options = options
        self._checkpoint = checkpoint
        self._cores = cores
        self._client = client
        self._stack = stack
        self._tell = tell

    async def open_all(self) -> tuple[list[System], list[System]]:
        """Ours, which the gate goes by, then the peer's."""
        options = self._options
        ours = []
        for shape in options.shapes:
            ours.append(
                await serve_baton(
                    self._checkpoint, shape, self._cores, options.logs, self._stack, self._tell
                )
            )
        wanted = await expected(ours[0], options.seed)
        for system in ours:
            self.passages.append(await check(system, self._client, wanted, options.seed))
            self._stop_for_now(system)
        peers: list[System] = []
        plan = await self._plan()
        if plan is None:
            return ours, peers
        for start in options.starts:
            for shape in options.shapes:
                self._tell(f"starting {PEER} {start} {shape}")
                try:
                    peers.append(await self._open_peer(plan, start, shape, wanted))
                except (EngineFailed, GateRed) as exc:
                    self._leave_out(f"{PEER} {start} {shape}", exc)
        return ours, peers

    async def _open_peer(
        self, plan: VllmPlan, start: str, shape: Shape, wanted: Sequence[Choice]
    ) -> System:
        """One that fails leaves no process behind."""
        async with contextlib.AsyncExitStack() as trial:
            system = await serve_vllm(plan, start, shape, trial, self._tell)
            passage = await check(system, self._client, wanted, self._options.seed)
            self._stack.push_async_exit(trial.pop_all())
        self.passages.append(passage)
        self._stop_for_now(system)
        return system

    def _stop_for_now(self, system: System) -> None:
        system.pause()
        # What is ended must be awake to end: called before the stack ends its processes.
        self._stack.callback(system.resume)

    async def _plan(self) -> VllmPlan | None:
        options = self._options
        log = options.logs / "install.log"
        try:
            python = await python_of(
                ENVIRONMENT,
                options.peer_folder,
                log,
                options.torch_pip_args,
                self._tell,
                may_install=not options.quick,
            )
            preload = ""
            if options.preload:
                found = await preload_paths(VLLM_PRELOADS, python, options.scratch, log)
                preload = ":".join(found)
        except Unavailable as exc:
            self._leave_out(PEER, exc)
            return None
        return VllmPlan(
            python, self._checkpoint, preload, self._cores, options.scratch, options.logs
        )

    def _leave_out(self, name: str, why: Exception) -> None:
        self._tell(f"left out: {name}: {why}")
        self.left_out.append(LeftOut(name, str(why)))
