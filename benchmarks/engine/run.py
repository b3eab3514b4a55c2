"""The run from end to end: engines through the gate, windows, memory."""

from __future__ import annotations

import contextlib
import datetime
import shutil

from benchmarks.engine.cases import CASES
from benchmarks.engine.checkpoint import CONFIG, SEED, make_checkpoint, num_parameters
from benchmarks.engine.measure import Contender, Patience, measure
from benchmarks.engine.report import FORMAT_VERSION, LeftOut, Result, Settings
from benchmarks.engine.results import Memory, memory_verdicts, ratios, speeds
from benchmarks.engine.stage import Options, Ready, Stage, Tell
from benchmarks.engine.variants import OURS
from benchmarks.provenance import provenance

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
ATTEMPTS = 3
FILL_TIMEOUT_S = 120.0


async def run(options: Options, tell: Tell) -> Result:
    """Raises GateRed when ours writes other tokens than transformers, EngineFailed when ours
    fails. A peer that cannot be installed or started, or fails, is left out and named."""
    origin = provenance()
    measured_at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    shutil.rmtree(options.logs, ignore_errors=True)
    options.logs.mkdir(parents=True)
    tell("making the checkpoint (32 million random weights)")
    checkpoint = make_checkpoint(options.scratch / "checkpoint")
    async with contextlib.AsyncExitStack() as stack:
        stage = Stage(options, checkpoint, stack, tell)
        ready = await stage.open_all()
        tell(f"gate green; {len(ready)} engine processes are ready; a trial round comes first")
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
    left_out = [
        *stage.left_out,
        *(LeftOut(name, f"failed on the way: {why}") for name, why in failed.items()),
    ]
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
        gate=tuple(r.gate for r in ready),
        speeds=tuple(found),
        ratios=tuple(ratios(found, options.peers, [case.name for case in CASES])),
        memory=tuple(memory),
        memory_verdicts=tuple(memory_verdicts(memory)),
        windows=tuple(windows),
    )


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
