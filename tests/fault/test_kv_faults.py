"""Hand-overs between real workers, harmed on their way. ``make fault-kv`` takes every fault at
every step; here are some of each kind."""

from __future__ import annotations

from pathlib import Path

from tests.support.kv_chaos import Harm, Step, harmed_cluster
from tests.support.kv_faults import SLOW_BYTES_PER_S, Trial, config_of


async def test_messages_and_frames_harmed_and_workers_frozen(tmp_path: Path) -> None:
    """Raw frames of computed chunks."""
    async with harmed_cluster(config_of("raw", "serialised"), tmp_path) as (cluster, script):
        trial = Trial(cluster, script, tmp_path, "serialised")
        for step, harm in (
            (Step.RESERVE, Harm.LOSE),
            (Step.GRANT, Harm.CUT),
            (Step.FIRST, Harm.CORRUPT_HEADER),
            (Step.MIDDLE, Harm.CORRUPT_PAYLOAD),
            (Step.MIDDLE, Harm.REORDER),
            (Step.END, Harm.CORRUPT_HEADER),
            (Step.ACK, Harm.LOSE),
        ):
            await trial.harmed(step, harm)
        await trial.frozen(Step.MIDDLE, "prefill")
        await trial.frozen(Step.MIDDLE, "decode")


async def test_coded_frames_that_go_layer_by_layer(tmp_path: Path) -> None:
    async with harmed_cluster(config_of("split", "layer-wise"), tmp_path) as (cluster, script):
        script.bytes_per_s = SLOW_BYTES_PER_S
        trial = Trial(cluster, script, tmp_path, "layer-wise")
        assert await trial.request() == "exact", trial.last_error
        script.frames.clear()
        assert await trial.request() == "exact", trial.last_error
        assert {frame.codec for frame in script.frames} == {"split"}
        assert len(script.frames) > 1, "each frame has room for all layers"
        assert all(frame.num_layers < 6 for frame in script.frames)
        for step, harm in (
            (Step.FIRST, Harm.LOSE),
            (Step.FIRST, Harm.CORRUPT_PAYLOAD),
            (Step.END, Harm.LOSE),
        ):
            await trial.harmed(step, harm)
