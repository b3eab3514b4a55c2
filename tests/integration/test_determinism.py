"""Deterministic mode: whatever the schedule, a request's logits are the same to the bit.

Each example draws who arrives when, how steps are cut, how little room there is, whether
prefixes are shared, and whether answers go on in another worker; each logits row that a token is
drawn from is compared with that of the request alone, its prompt in one piece. Swaps, drafts
and prefill by layers are drawn as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from baton.engine.block_pool import BlockPool
from baton.engine.executor import Executor
from baton.engine.plan import StepPlan
from baton.engine.scheduler import NewToken, Scheduler, Sequence
from baton.protocol.config import EngineConfig
from baton.protocol.sampling import SamplingParams
from tests.support.tiny_checkpoint import (
    TINY_LLAMA,
    TINY_MISTRAL,
    tiny_weights,
    write_checkpoint,
)

NUM_SCHEDULES = 200
NUM_BLOCKS = 64
SWAP_BLOCKS = 32
MAX_TOKENS = 4
_COMMON = tuple(int(t) for t in np.random.default_rng(5).integers(2, 61, 200))
PROMPTS = (
    _COMMON[:1],
    _COMMON[:15],
    _COMMON[:16],
    _COMMON[:65],
    _COMMON[:110],
    (*_COMMON[:48], 7, 7, 7),
    (*_COMMON[:64], *_COMMON[100:140]),
    tuple(reversed(_COMMON[:40])),
)
"""Many begin alike, so that prefixes are found in the cache."""
# Wide enough that a matrix library treats unlike numbers of rows unlike: then this test fails.
_WIDER = {"hidden_size": 128, "intermediate_size": 352}
LONGEST = max(map(len, PROMPTS)) + MAX_TOKENS
_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 3,
    "use_sliding_window": True,
    "sliding_window": 20,
    "max_window_layers": 1,
}
CONFIGS = {
    "llama": TINY_LLAMA | _WIDER,
    "mistral": TINY_MISTRAL | _WIDER,
    "qwen2": TINY_LLAMA | _WIDER | _QWEN2,
}
"""All layers see all tokens, all slide, and the upper two slide."""


@cache
def folder(name: str) -> Path:
    weights = tiny_weights(CONFIGS[name])
    if name == "qwen2":
        for projection in [
            n for n in weights if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
        ]:
            bias = 0.3 * torch.randn(weights[projection].shape[0])
            weights[projection.replace("weight", "bias")] = bias
    return write_checkpoint(Path(mkdtemp(prefix=f"baton-{name}-")), CONFIGS[name], weights)


class Recording:
    """An executor that keeps the logits of its last step."""

    def __init__(self, name: str, block_size: int, num_threads: int) -> None:
        self.executor = Executor.load(
            folder(name),
            dtype="bfloat16",
            device="cpu",
            num_blocks=NUM_BLOCKS,
            block_size=block_size,
            num_threads=num_threads,
            swap_blocks=SWAP_BLOCKS,
            deterministic=True,
        )
        self._logits: list[Tensor] = []
        decoder: Any = self.executor._decoder
        logits = decoder.logits

        def record(*args: Any, **kwargs: Any) -> Any:
            self._logits.append(logits(*args, **kwargs))
            return self._logits[-1]

        decoder.logits = record

    def run(self, plan: StepPlan) -> tuple[Any, dict[str, list[Tensor]]]:
        """Rows by sequence: one, and one more per draft."""
        self._logits = []
        result = self.executor.execute(plan)
        rows: dict[str, list[Tensor]] = {}
        names = [c.seq_id for c in plan.chunks if c.samples for _ in range(1 + c.num_drafts)]
        logits = [row.clone() for part in self._logits for row in part]
        for name, row in zip(names, logits, strict=True):
            rows.setdefault(name, []).append(row)
        return result, rows


recordings = cache(Recording)


def sampling(number: int) -> SamplingParams:
    temperature = 1.0 if number % 2 else 0.0
    return SamplingParams(
        max_tokens=MAX_TOKENS, temperature=temperature, seed=number, ignore_eos=True
    )


@cache
def alone(name: str, number: int) -> tuple[tuple[int, ...], tuple[Tensor, ...]]:
    """Tokens and the logits that each was drawn from, by a worker that runs nothing else."""
    worker = Recording(name, 16, 1)
    scheduler = Scheduler(BlockPool(NUM_BLOCKS, 16), EngineConfig(prefix_cache=False), frozenset())
    scheduler.add(Sequence("alone", PROMPTS[number], [], sampling(number)))
    tokens, logits = [], []
    while plan := scheduler.schedule():
        result, rows = worker.run(plan)
        tokens += [new.token_id for new in scheduler.complete(result)]
        logits += rows["alone"]
    return tuple(tokens), tuple(logits)


@dataclass(frozen=True)
class Schedule:
    model: str
    arrivals: tuple[tuple[int, int], ...]
    """(step, number of the prompt)."""
    block_size: int
    num_threads: int
    num_blocks: int
    engine: EngineConfig
    splits: bool


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    block_size = draw(st.sampled_from((8, 16)))
    return Schedule(
        model=draw(st.sampled_from(sorted(CONFIGS))),
        arrivals=tuple(
            draw(
                st.lists(
                    st.tuples(st.integers(0, 8), st.integers(0, len(PROMPTS) - 1)),
                    min_size=1,
                    max_size=6,
                )
            )
        ),
        block_size=block_size,
        num_threads=draw(st.sampled_from((1, 2))),
        num_blocks=draw(st.integers(1, NUM_BLOCKS)),
        engine=EngineConfig(
            block_size=block_size,
            max_num_seqs=draw(st.integers(1, 8)),
            max_num_batched_tokens=draw(st.integers(1, 260)),
            prefix_cache=draw(st.booleans()),
            prefill_mode=draw(st.sampled_from(("chunked", "layered"))),
            speculation=draw(st.sampled_from(("off", "prompt_lookup"))),
            swap_blocks=draw(st.sampled_from((0, SWAP_BLOCKS))),
            watermark=0.0,
        ),
        splits=draw(st.booleans()),
    )


class Side:
    def __init__(self, schedule: Schedule, block_size: int) -> None:
        self.worker = recordings(schedule.model, block_size, schedule.num_threads)
        layout = self.worker.executor.layout
        num_blocks = max(schedule.num_blocks, -(-LONGEST // block_size))
        self.scheduler = Scheduler(
            BlockPool(num_blocks, block_size),
            schedule.engine,
            frozenset(),
            block_bytes=block_size * layout.bytes_per_token,
            num_layers=layout.num_layers,
        )

    def step(self, checked: dict[str, int]) -> list[NewToken]:
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        result, rows = self.worker.run(plan)
        news = self.scheduler.complete(result)
        for new in news:
            sequence = new.sequence
            number = int(sequence.seq_id.split("-")[0])
            tokens, logits = alone(self.model, number)
            place = checked.get(sequence.seq_id, 0)
            row = rows[sequence.seq_id].pop(0)
            assert torch.equal(row, logits[place]), (sequence.seq_id, place)
            assert new.token_id == tokens[place]
            checked[sequence.seq_id] = place + 1
        return news

    @property
    def model(self) -> str:
        return self.worker.executor.spec.family


def hand_over(source: Side, target: Side, sequence: Sequence) -> bool:
    """Moves the rows that what follows looks at, and no others. False where the target has no
    room: then it stays."""
    num_tokens = sequence.num_computed
    pool = target.scheduler.pool
    need = pool.blocks_for(num_tokens)
    if need > pool.num_free or target.scheduler.num_running >= 8:
        return False
    table = source.scheduler.take_blocks(sequence, "leaving")
    blocks = pool.allocate(sequence.seq_id, need)
    layout = source.worker.executor.layout
    for group in layout.groups:
        start = group.needed_from(num_tokens)
        for run in group.runs if start < num_tokens else ():
            part = (start, num_tokens - start, *run)
            payload = source.worker.executor.read_kv(table, *part)
            target.worker.executor.write_kv(blocks, *part, payload)
    source.scheduler.pool.release("leaving", table)
    target.scheduler.add_computed(
        Sequence(
            sequence.seq_id,
            sequence.prompt_ids,
            list(sequence.output_ids),
            sequence.sampling,
            block_table=tuple(blocks),
            num_computed=num_tokens,
            complete_from=layout.complete_from(num_tokens),
        )
    )
    return True


@settings(max_examples=NUM_SCHEDULES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedules())
def test_no_schedule_changes_a_bit(schedule: Schedule) -> None:
    first = Side(schedule, schedule.block_size)
    sides = [first]
    if schedule.splits:
        other = Side(schedule, 24 - schedule.block_size)
        sides.append(other)
    for side in sides:
        # What was computed in an earlier example must not be found here.
        with torch.inference_mode():
            side.worker.executor._cache.blocks.fill_(float("nan"))
    waiting = sorted(
        (step, f"{number}-{order}", number)
        for order, (step, number) in enumerate(schedule.arrivals)
    )
    checked: dict[str, int] = {}
    for step in range(2_000):
        while waiting and waiting[0][0] <= step:
            _, name, number = waiting.pop(0)
            first.scheduler.add(Sequence(name, PROMPTS[number], [], sampling(number)))
        news = [new for side in sides for new in side.step(checked)]
        if schedule.splits:
            for new in news:
                if first.scheduler.get(new.sequence.seq_id) is new.sequence:
                    hand_over(first, sides[1], new.sequence)
        if not waiting and not any(
            s.scheduler.num_running + s.scheduler.num_waiting for s in sides
        ):
            break
    assert list(checked.values()) == [MAX_TOKENS] * len(schedule.arrivals)
    for side in sides:
        assert side.scheduler.check_integrity() == []
