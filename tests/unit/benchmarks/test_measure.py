"""The plan of a run, and a real load client against a scripted server."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

import baton
from baton.api.v1 import baton_pb2 as pb
from baton.protocol.errors import Overloaded
from benchmarks.arrivals import Fixed, Uniform, seeded
from benchmarks.deployments import Deployment
from benchmarks.load_job import Job, PlannedRequest
from benchmarks.load_process import load_process
from benchmarks.measure import check, measure, plan_requests, prepare, turns
from benchmarks.prompts import PromptCutter
from benchmarks.workload import Gate, Schedule, SloLimits, Workload
from router.frontend import GenerateSpec
from tests.support.grpc_serving import serving
from tests.support.scripted_frontend import Script, ScriptedFrontend, tokens

WORKLOAD = Workload(
    name="test",
    seed=5,
    prompt_tokens=Uniform(min=4, max=12),
    output_tokens=Fixed(tokens=3),
    schedule=Schedule(rates_rps=(30.0,), repeats=1, warmup_s=0.1, window_s=0.3, cooldown_s=0.1),
    slo=SloLimits(ttft_ms=1_000, tpot_ms=1_000),
    gate=Gate(prompts=3, output_tokens=3),
)
CUTTER = PromptCutter((1,), list(range(100, 400)))


def sent(requests: list[PlannedRequest]) -> list[pb.GenerateRequest]:
    return [pb.GenerateRequest.FromString(r.message) for r in requests]


def test_deployments_take_turns() -> None:
    schedule = Schedule(rates_rps=(1.0, 2.0), repeats=2)
    order = turns(schedule, [Deployment("A", "a"), Deployment("B", "b")])
    assert [(t.deployment.name, t.rate_rps, t.repeat) for t in order] == [
        ("A", 1.0, 0),
        ("B", 1.0, 0),
        ("A", 1.0, 1),
        ("B", 1.0, 1),
        ("A", 2.0, 0),
        ("B", 2.0, 0),
        ("A", 2.0, 1),
        ("B", 2.0, 1),
    ]


def test_requests_follow_from_seed_rate_and_repeat() -> None:
    one, same = (plan_requests(WORKLOAD, CUTTER, 30.0, 0) for _ in range(2))
    other = plan_requests(WORKLOAD, CUTTER, 30.0, 1)
    assert [r.at_s for r in one] == [r.at_s for r in same] != [r.at_s for r in other]
    for a, b in zip(sent(one), sent(same), strict=True):
        assert a.request_id != b.request_id, "an id is used once"
        a.request_id = b.request_id
        assert a == b
    for request, message in zip(one, sent(one), strict=True):
        assert request.is_measured == (0.1 <= request.at_s < 0.4)
        assert 4 <= len(message.token_ids.ids) <= 12
        assert message.token_ids.ids[0] == 1, "the begin token of the model"
        assert message.sampling_params.max_tokens == 3
        assert message.sampling_params.ignore_eos


def test_prompts_are_cut_to_length() -> None:
    assert CUTTER.cut(1, seeded(1)) == (1,)
    cut = CUTTER.cut(20, seeded(1))
    assert len(cut) == 20
    assert list(cut[1:]) == list(range(cut[1], cut[1] + 19))


async def test_the_client_reports_tokens_errors_and_what_it_left_out() -> None:
    def script(spec: GenerateSpec) -> Script:
        if spec.prompt_ids == (7,):
            return Script(error=Overloaded("full"))
        if spec.prompt_ids == (8,):
            return Script(stall_after=1)
        return Script(choices=(tokens(*"abcd"),), tokens_per_output=2)

    def planned(token_id: int, is_measured: bool) -> PlannedRequest:
        message = pb.GenerateRequest(
            request_id=f"r-{token_id}", token_ids=pb.TokenIds(ids=[token_id])
        )
        return PlannedRequest(0.01 * token_id, message.SerializeToString(), is_measured)

    requests = (planned(6, True), planned(7, True), planned(8, False))
    async with serving(ScriptedFrontend(script)) as address, load_process() as load:
        async with asyncio.timeout(30):
            await load.start(Job(address, 5.0, requests))
            good, refused = await load.result()
    assert good.error == ""
    assert len(good.token_times_s) == 4
    assert good.arrival_s == 0.06 <= good.sent_s <= good.token_times_s[0]
    assert good.token_times_s[0] == good.token_times_s[1], "they came in one message"
    assert (refused.error, refused.token_times_s) == ("overloaded", ())


async def test_a_server_that_is_not_there_is_an_error_of_every_request() -> None:
    async with serving(ScriptedFrontend()) as address:
        pass
    message = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[1])).SerializeToString()
    async with load_process() as load, asyncio.timeout(40):
        await load.start(Job(address, 5.0, (PlannedRequest(0.0, message, True),)))
        (record,) = await load.result()
    assert record.error == "unavailable"


async def test_a_run_from_the_prompts_to_the_segments() -> None:
    frontend = ScriptedFrontend(Script(choices=(tokens("a", "b", "c", top=2),)))
    async with serving(frontend) as address, asyncio.timeout(40):
        deployment = Deployment("scripted", address)
        cutter = await prepare(WORKLOAD, deployment)
        (gate,) = await check(WORKLOAD, [deployment], cutter)
        told: list[str] = []
        (segment,) = await measure(WORKLOAD, [deployment], cutter, told.append)
    assert (gate.compared, gate.num_tokens) == (("scripted", "scripted"), 9)
    assert len(told) == 1
    measured = [r for r in segment.records if r.is_measured]
    expected = plan_requests(WORKLOAD, cutter, 30.0, 0)
    assert len(measured) == sum(r.is_measured for r in expected) > 0
    assert all(not r.error and len(r.token_times_s) == 3 for r in measured)


async def test_a_workload_that_the_model_cannot_hold_is_refused() -> None:
    long = msgspec.structs.replace(WORKLOAD, prompt_tokens=Fixed(tokens=400))
    async with serving(ScriptedFrontend()) as address:
        with pytest.raises(baton.BatonError, match="max_model_len 256"):
            await prepare(long, Deployment("scripted", address))
