"""Models whose layers slide: the rows behind a window stay where they are, the tokens the same.

Deterministic, so that a token that differs is a mistake and no tie. The checkpoints are
baton-tiny under other names, with windows that it was not trained with: it is what it says
that matters here, and not whether it makes sense.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.checkpoint.find import resolve
from baton.engine.executor import Executor
from baton.engine.plan import SequenceChunk, StepPlan
from baton.protocol.config import (
    ClusterConfig,
    EngineConfig,
    KvTransferConfig,
    ModelConfig,
    PoolConfig,
    RouterConfig,
)
from baton.protocol.sampling import SamplingParams
from tests.support.clusters import assert_no_residue, running_cluster, settled
from tests.support.prompts import prompt_of

NUM_TOKENS = 40
WINDOW = 48
LENGTHS = (20, 47, 48, 49, 64, 130, 300)
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "sliding_window": WINDOW,
}
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "use_sliding_window": True,
    "sliding_window": WINDOW,
    "max_window_layers": 2,
}


def disguised(folder: Path, change: dict[str, Any]) -> Path:
    """A copy of baton-tiny that says it is another model."""
    profile = shutil.ignore_patterns("kv_codec.profile")  # It is of that checkpoint alone.
    shutil.copytree(resolve("baton-tiny"), folder, ignore=profile)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    if change["model_type"] == "qwen2":
        [path] = folder.glob("*.safetensors")
        weights = load_file(path)
        for name in list(weights):
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                bias = torch.zeros(len(weights[name]), dtype=weights[name].dtype)
                weights[name.replace("weight", "bias")] = bias
        save_file(weights, path)
    return folder


def alone(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of an engine that has the whole KV of one request at a time."""
    executor = Executor.load(
        folder,
        dtype="float32",
        device="cpu",
        num_blocks=32,
        block_size=16,
        num_threads=1,
        deterministic=True,
    )
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS)
    table = tuple(range(32))
    outputs = []
    for step, prompt in enumerate(prompts):
        tokens = list(prompt)
        start = 0
        for _ in range(NUM_TOKENS):
            chunk = SequenceChunk(f"s{step}", tuple(tokens[start:]), start, table, True, greedy)
            start = len(tokens)
            tokens.append(int(executor.forward_logits(StepPlan(step, (chunk,)))[0].argmax()))
        outputs.append(tokens[len(prompt) :])
    return outputs


@pytest.mark.parametrize(
    ("change", "num_full"), [(MISTRAL, 0), (QWEN2, 2)], ids=["all-slide", "upper-slide"]
)
async def test_only_the_rows_within_the_windows_cross(
    change: dict[str, Any], num_full: int, tmp_path: Path
) -> None:
    """The decode pool is too small for all at once, and two prompts come twice: what is looked
    for in its prefix cache, by those that are computed again, lacks nothing."""
    folder = disguised(tmp_path / "model", change)
    config = ClusterConfig(
        version=1,
        model=ModelConfig(path=str(folder), dtype="float32", deterministic=True),
        pools=(
            PoolConfig(name="p", role="prefill", engine=EngineConfig(max_num_batched_tokens=128)),
            PoolConfig(
                name="d",
                role="decode",
                engine=EngineConfig(num_blocks=24, growth_tokens=8, watermark=0.0),
            ),
        ),
        kv_transfer=KvTransferConfig(codec="raw"),
        router=RouterConfig(grpc_port=0, http_port=0),
    )
    prompts = [prompt_of(length, seed) for seed, length in enumerate(LENGTHS)]
    prompts += [prompts[4], prompts[5]]
    async with running_cluster(config, tmp_path) as cluster:
        before = {w.worker_id: w for w in (await settled(cluster)).workers}
        completions = await asyncio.gather(
            *(
                cluster.client.generate(
                    ids, max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True
                )
                for ids in prompts
            )
        )
        after = {w.worker_id: w for w in (await settled(cluster)).workers}
        await assert_no_residue(cluster)
    outputs = [[t.token_id for t in c.choices[0].tokens] for c in completions]
    assert outputs == alone(folder, prompts)
    row_bytes = 2 * 2 * 64 * 4
    rows = sum(num_full * len(ids) + (6 - num_full) * min(len(ids), WINDOW - 1) for ids in prompts)
    sent = after["p-0"].kv_bytes_sent - before["p-0"].kv_bytes_sent
    assert sent == rows * row_bytes
    assert after["d-0"].num_preemptions > before["d-0"].num_preemptions
