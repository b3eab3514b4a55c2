"""The run itself: prompts, gate, then every deployment in turn, rate by rate."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import baton
from baton.client.requests import generate_request
from baton.protocol.errors import ConfigError
from benchmarks.arrivals import poisson, seeded
from benchmarks.cpu import shares, snapshot
from benchmarks.deployments import Deployment
from benchmarks.gate import GateResult, compare, greedy_answers
from benchmarks.load_job import Job, PlannedRequest
from benchmarks.load_process import LoadProcess, load_process
from benchmarks.metrics import Segment
from benchmarks.prompts import PromptCutter, load_cutter
from benchmarks.workload import Schedule, Workload


@dataclass(frozen=True, slots=True)
class Turn:
    deployment: Deployment
    rate_rps: float
    repeat: int


def turns(schedule: Schedule, deployments: Sequence[Deployment]) -> Iterator[Turn]:
    """A B A B at the first rate, then at the next: neighbours in time are compared."""
    for rate_rps in schedule.rates_rps:
        for repeat in range(schedule.repeats):
            for deployment in deployments:
                yield Turn(deployment, rate_rps, repeat)


def segment_s(schedule: Schedule) -> float:
    """Without the end of the last answers."""
    return schedule.warmup_s + schedule.window_s + schedule.cooldown_s


def plan_requests(
    workload: Workload, cutter: PromptCutter, rate_rps: float, repeat: int
) -> list[PlannedRequest]:
    """By seed, rate and repeat alone: the same for every deployment."""
    schedule = workload.schedule
    times = poisson(
        rate_rps, segment_s(schedule), seeded(workload.seed, "arrivals", rate_rps, repeat)
    )
    random = seeded(workload.seed, "requests", rate_rps, repeat)
    planned = []
    for at_s in times:
        message = generate_request(
            cutter.cut(workload.prompt_tokens.draw(random), random),
            {
                "max_tokens": workload.output_tokens.draw(random),
                "temperature": workload.temperature,
                "seed": random.getrandbits(31),
                "ignore_eos": True,
            },
        )
        message.timeout_s = schedule.request_timeout_s
        in_window = schedule.warmup_s <= at_s < schedule.warmup_s + schedule.window_s
        planned.append(PlannedRequest(at_s, message.SerializeToString(), in_window))
    return planned


async def prepare(workload: Workload, deployment: Deployment) -> PromptCutter:
    """Raises ConfigError when the workload does not fit the model that is served."""
    async with baton.AsyncClient(deployment.address) as client:
        model = await client.model_info()
        if workload.longest_tokens > model.max_model_len:
            raise ConfigError(
                f"prompt_tokens and output_tokens reach {workload.longest_tokens} tokens together; "
                f"{deployment.name} serves max_model_len {model.max_model_len}: draw shorter ones"
            )
        return await load_cutter(client, model.max_model_len, seeded(workload.seed, "corpus"))


async def check(
    workload: Workload, deployments: Sequence[Deployment], cutter: PromptCutter
) -> list[GateResult]:
    """Each deployment against the first; a single one against itself. Raises GateFailed."""
    random = seeded(workload.seed, "gate")
    prompts = [
        cutter.cut(workload.prompt_tokens.draw(random), random)
        for _ in range(workload.gate.prompts)
    ]
    asked = [*deployments] if len(deployments) > 1 else [*deployments] * 2
    answers = []
    for deployment in asked:
        async with baton.AsyncClient(deployment.address) as client:
            timeout_s = workload.schedule.request_timeout_s
            answers.append(await greedy_answers(client, prompts, workload.gate, timeout_s))
    return [
        compare((asked[0].name, other.name), answers[0], answer, workload.gate)
        for other, answer in zip(asked[1:], answers[1:], strict=True)
    ]


async def measure(
    workload: Workload,
    deployments: Sequence[Deployment],
    cutter: PromptCutter,
    tell: Callable[[str], None],
) -> list[Segment]:
    planned = list(turns(workload.schedule, deployments))
    segments = []
    async with load_process() as load:
        for number, turn in enumerate(planned):
            left_s = (len(planned) - number) * segment_s(workload.schedule)
            tell(
                f"{number + 1}/{len(planned)}  {turn.deployment.name} at {turn.rate_rps:g} "
                f"requests/s, repeat {turn.repeat + 1}; about {_duration(left_s)} left"
            )
            segments.append(await _segment(workload, turn, deployments, cutter, load))
    return segments


async def _segment(
    workload: Workload,
    turn: Turn,
    deployments: Sequence[Deployment],
    cutter: PromptCutter,
    load: LoadProcess,
) -> Segment:
    schedule = workload.schedule
    requests = plan_requests(workload, cutter, turn.rate_rps, turn.repeat)
    groups = {
        "deployment": turn.deployment.pids,
        "client": (load.pid, os.getpid()),
        "idle_deployments": tuple(
            pid for other in deployments if other is not turn.deployment for pid in other.pids
        ),
    }
    await load.start(Job(turn.deployment.address, schedule.request_timeout_s, tuple(requests)))
    await asyncio.sleep(schedule.warmup_s)
    before = snapshot(groups)
    await asyncio.sleep(schedule.window_s)
    cpu = shares(before, snapshot(groups))
    if not turn.deployment.pids:
        # Whoever runs it is not known here: what it used cannot be told from what others did.
        cpu = {**cpu, "deployment": math.nan, "foreign": math.nan}
    return Segment(
        deployment=turn.deployment.name,
        rate_rps=turn.rate_rps,
        repeat=turn.repeat,
        warmup_s=schedule.warmup_s,
        window_s=schedule.window_s,
        records=await load.result(),
        cpu=cpu,
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
