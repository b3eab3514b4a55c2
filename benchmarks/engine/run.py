"""The run from end to end: environments, processes, gate, windows, memory."""

from __future__ import annotations

import contextlib
import datetime
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.answer import Setup
from benchmarks.engine.cases import CASES
from benchmarks.engine.checkpoint import (
    CONFIG,
    MAX_MODEL_LEN,
    SEED,
    make_checkpoint,
    num_parameters,
)
from benchmarks.engine.engine_process import EngineFailed, EngineProcess, engine_process
from benchmarks.engine.environments import Unavailable, preload_paths, python_of
from benchmarks.engine.gate import GateResult, check
from benchmarks.engine.measure import Contender, Patience, measure
from benchmarks.engine.report import FORMAT_VERSION, EngineFacts, LeftOut, Result, Settings
from benchmarks.engine.results import Memory, memory_verdicts, ratios, speeds
from benchmarks.engine.variants import (
    OURS,
    PLANS,
    REFERENCE,
    EnginePlan,
    Variant,
    process_environment,
    variants_of,
)
from benchmarks.provenance import provenance

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ATTEMPTS = 3
FILL_TIMEOUT_S = 120.0

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

    pool_tokens: int = 65_536
    max_num_batched_tokens: int = 2_048
    max_num_seqs: int = 64


@dataclass(frozen=True, slots=True)
class Ready:
    variant: Variant
    process: EngineProcess
    facts: EngineFacts
    pool_bytes: int


async def run(options: Options, tell: Tell) -> Result:
    """Raises GateRed when ours writes other tokens than transformers, EngineFailed when ours
    fails. A peer that fails to install or to start is left out and named."""
    origin = provenance()
    measured_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    logs = options.scratch / "logs"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    tell("making the checkpoint (32 million random weights)")
    checkpoint = make_checkpoint(options.scratch / "checkpoint")
    left_out: list[LeftOut] = []
    async with contextlib.AsyncExitStack() as stack:
        ready = [
            await _open(variant, sys.executable, {}, checkpoint, options, stack, tell)
            for variant in _wanted(PLANS[OURS], options)
        ]
        tell("gate: are our greedy tokens those of transformers?")
        gate = await _gate(ready[0], checkpoint, options)
        for name in options.peers:
            ready += await _open_peer(PLANS[name], checkpoint, options, stack, left_out, tell)
        tell(f"{len(ready)} engine processes are ready; a trial round comes first")
        windows, failed = await measure(
            [Contender(r.variant.engine, r.process, r.variant.engine == OURS) for r in ready],
            CASES,
            repeats=options.repeats,
            seed=options.seed,
            window_s=options.window_s,
            patience=Patience(options.patience_s, ATTEMPTS),
            tell=tell,
        )
        tell("filling the KV pools to see how much memory they take")
        memory = [await _memory(r) for r in ready if r.variant.name not in failed]
    left_out += [LeftOut(name, f"failed on the way: {why}") for name, why in failed.items()]
    found = speeds(windows, {r.variant.name: r.variant.engine for r in ready})
    settings = Settings(
        num_threads=options.num_threads,
        repeats=options.repeats,
        seed=options.seed,
        window_s=options.window_s,
        pool_tokens=options.pool_tokens,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
    )
    return Result(
        version=FORMAT_VERSION,
        measured_at=measured_at,
        provenance=origin,
        settings=settings,
        checkpoint={"seed": SEED, "parameters": num_parameters(), **CONFIG},
        cases=CASES,
        engines=tuple(r.facts for r in ready),
        left_out=tuple(left_out),
        gate=(gate,),
        speeds=tuple(found),
        ratios=tuple(ratios(found, options.peers, [case.name for case in CASES])),
        memory=tuple(memory),
        memory_verdicts=tuple(memory_verdicts(memory)),
        windows=tuple(windows),
    )


def _wanted(plan: EnginePlan, options: Options) -> list[Variant]:
    return [v for v in variants_of(plan, quick=options.quick) if v.dtype in options.dtypes]


async def _gate(ours: Ready, checkpoint: Path, options: Options) -> GateResult:
    """transformers comes from our own environment here: the gate needs no peer."""
    reference = Variant(REFERENCE, "float32", "dynamic")
    async with contextlib.AsyncExitStack() as stack:
        other = await _open(reference, sys.executable, {}, checkpoint, options, stack, _silent)
        return await check(ours.process, other.process, options.seed)


async def _open_peer(
    plan: EnginePlan,
    checkpoint: Path,
    options: Options,
    stack: contextlib.AsyncExitStack,
    left_out: list[LeftOut],
    tell: Tell,
) -> list[Ready]:
    assert plan.environment is not None
    log = options.scratch / "logs" / f"install-{plan.name}.log"
    try:
        python = await python_of(
            plan.environment,
            options.peer_folder,
            log,
            options.torch_pip_args,
            tell,
            may_install=not options.quick,
        )
    except Unavailable as exc:
        tell(f"left out: {plan.name}: {exc}")
        left_out.append(LeftOut(plan.name, str(exc)))
        return []
    ready = []
    for variant in _wanted(plan, options):
        try:
            preload: dict[str, str] = {}
            if libraries := plan.preloads.get(variant.mode):
                paths = await preload_paths(libraries, python, options.scratch, log)
                preload["LD_PRELOAD"] = ":".join(paths)
            ready.append(
                await _open(variant, str(python), preload, checkpoint, options, stack, tell)
            )
        except (Unavailable, EngineFailed) as exc:
            tell(f"left out: {variant.name}: {exc}")
            left_out.append(LeftOut(variant.name, str(exc)))
    return ready


async def _open(
    variant: Variant,
    python: str,
    preload: dict[str, str],
    checkpoint: Path,
    options: Options,
    stack: contextlib.AsyncExitStack,
    tell: Tell,
) -> Ready:
    tell(f"starting {variant.name}")
    environment = process_environment(variant, options.num_threads, str(options.scratch)) | preload
    log = options.scratch / "logs" / f"{variant.name.replace(' ', '-')}.log"
    module = PLANS[variant.engine].module
    process = await stack.enter_async_context(
        engine_process(variant.name, python, module, environment, log)
    )
    setup = Setup(
        checkpoint=str(checkpoint),
        dtype=variant.dtype,
        mode=variant.mode,
        num_threads=options.num_threads,
        pool_tokens=options.pool_tokens,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_num_seqs=options.max_num_seqs,
    )
    found = await process.open(setup)
    facts = EngineFacts(variant.engine, variant.name, found["versions"], found["load_s"])
    return Ready(variant, process, facts, found["pool_bytes"])


async def _memory(ready: Ready) -> Memory:
    filled = (await ready.process.ask({"op": "fill_pool"}, FILL_TIMEOUT_S))["filled"]
    return Memory(
        engine=ready.variant.engine,
        variant=ready.variant.name,
        weights_bytes=num_parameters() * DTYPE_BYTES[ready.variant.dtype],
        pool_bytes=ready.pool_bytes,
        idle_bytes=ready.process.idle_bytes,
        peak_bytes=ready.process.peak_bytes(),
        pool_filled=filled,
    )


def _silent(_: str) -> None: ...
