"""Every fault at every step of a hand-over, over raw and coded frames, sent chunk by chunk or layer
by layer: ``make fault-kv``. Too long for every day; ``test_kv_faults`` takes some of each."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.fault.test_kv_dead_epochs import dead_epoch
from tests.support.kv_chaos import harmed_cluster
from tests.support.kv_faults import (
    SLOW_BYTES_PER_S,
    Codec,
    Trial,
    Way,
    config_of,
    message_faults,
    process_faults,
)

pytestmark = pytest.mark.timeout(1_500)

CODECS: tuple[Codec, ...] = ("raw", "split")
WAYS: tuple[Way, ...] = ("serialised", "layer-wise")


@pytest.mark.parametrize(("codec", "way"), [*itertools.product(CODECS, WAYS)])
async def test_messages_harmed_and_workers_frozen(tmp_path: Path, codec: Codec, way: Way) -> None:
    async with harmed_cluster(config_of(codec, way), tmp_path) as (cluster, script):
        if way == "layer-wise":
            script.bytes_per_s = SLOW_BYTES_PER_S
        trial = Trial(cluster, script, tmp_path, way)
        for step, harm in message_faults():
            await trial.harmed(step, harm)
        for step, role in process_faults():
            await trial.frozen(step, role)
        print(f"{codec}, {way}: {sum(trial.outcomes.values())} faults, {dict(trial.outcomes)}")


@pytest.mark.parametrize(("codec", "way"), [("raw", "serialised"), ("split", "layer-wise")])
async def test_workers_killed(tmp_path: Path, codec: Codec, way: Way) -> None:
    async with harmed_cluster(config_of(codec, way), tmp_path, supervise=True) as (
        cluster,
        script,
    ):
        trial = Trial(cluster, script, tmp_path, way)
        for step, role in process_faults():
            await trial.killed(step, role)
        print(f"{codec}, {way}: {sum(trial.outcomes.values())} kills, {dict(trial.outcomes)}")


async def test_frames_of_a_dead_epoch_over_zeromq(tmp_path: Path) -> None:
    await dead_epoch(tmp_path, "zeromq")
