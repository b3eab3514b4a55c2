from __future__ import annotations

from baton.protocol.lifecycle import MEMBER_TRANSITIONS, Machine, MemberEvent, MemberState
from baton.protocol.spec import WorkerInfo
from router.members import Member
from router.placement import GROWTH_TOKENS, Need, Placement, Placer

NONE: frozenset[str] = frozenset()


def member(
    worker_id: str, capacity_tokens: int = 1_000, fingerprint: str = "fp", *, up: bool = True
) -> Member:
    role = {"p": "prefill", "d": "decode", "m": "mixed"}[worker_id[0]]
    info = WorkerInfo(worker_id=worker_id, incarnation="1", role=role, address="a", pid=1)
    machine = Machine(worker_id, MEMBER_TRANSITIONS, MemberState.JOINING, 0.0)
    if up:
        machine.move(MemberEvent.ACCEPTED, 0.0)
    return Member(info, machine, 0.0, fingerprint, capacity_tokens)


def names(placement: Placement | None) -> tuple[str, str] | None:
    if placement is None:
        return None
    return (placement.prefill.worker_id if placement.prefill else "-", placement.decode.worker_id)


def test_need_counts_what_must_fit() -> None:
    need = Need(num_tokens=100, max_new_tokens=10)
    assert (need.decode_charge, need.longest) == (110, 109)
    assert Need(100, 10_000).decode_charge == 100 + GROWTH_TOKENS


def test_a_burst_spreads_before_any_report_and_charges_go_back() -> None:
    members = [member(w) for w in ("p-0", "p-1", "d-0", "d-1")]
    placer = Placer("least_loaded")
    placed = [placer.place(Need(10, 5), members, NONE) for _ in range(4)]
    assert {names(p) for p in placed[:2]} == {("p-0", "d-0"), ("p-1", "d-1")}
    assert [m.charged_tokens for m in members] == [20, 20, 30, 30]
    for placement in placed:
        assert placement is not None
        placement.first_token_came()
        placement.first_token_came()
    assert [m.charged_tokens for m in members] == [0, 0, 30, 30]
    for placement in placed:
        assert placement is not None
        placement.release()
        placement.release()
    assert [m.charged_tokens for m in members] == [0, 0, 0, 0]


def test_the_least_loaded_is_relative_to_its_size() -> None:
    small, large = member("d-0", 500), member("d-1", 4_000)
    small.charged_tokens, large.charged_tokens = 100, 400
    placement = Placer("least_loaded").place(Need(10, 5), [member("p-0"), small, large], NONE)
    assert names(placement) == ("p-0", "d-1")


def test_round_robin_ignores_load() -> None:
    busy, idle = member("m-0"), member("m-1")
    busy.charged_tokens = 900
    placer = Placer("round_robin")
    placed = [names(placer.place(Need(1, 1), [busy, idle], NONE)) for _ in range(4)]
    assert placed == [("-", "m-0"), ("-", "m-1"), ("-", "m-0"), ("-", "m-1")]


def test_a_new_member_gets_its_share_and_not_the_whole_burst() -> None:
    placer = Placer("round_robin")
    old = [member("m-0"), member("m-1")]
    for _ in range(100):
        placer.place(Need(1, 1), old, NONE)
    fresh = member("m-2")
    placed = [names(placer.place(Need(1, 1), [*old, fresh], NONE)) for _ in range(6)]
    assert sorted(w for _, w in placed if w) == ["m-0", "m-0", "m-1", "m-1", "m-2", "m-2"]


def test_only_equal_layouts_are_paired() -> None:
    members = [member("p-0", fingerprint="x"), member("p-1"), member("d-0"), member("d-1")]
    assert names(Placer("least_loaded").place(Need(1, 5), members, NONE)) == ("p-1", "d-0")
    assert Placer("least_loaded").place(Need(1, 5), members[:1] + members[2:], NONE) is None


def test_room_is_needed_on_both_sides() -> None:
    placer = Placer("least_loaded")
    members = [member("p-0", 100), member("d-0", 109), member("d-1", 108)]
    assert names(placer.place(Need(100, 10), members, NONE)) == ("p-0", "d-0")
    assert placer.place(Need(100, 11), members, NONE) is None
    assert placer.place(Need(101, 5), members, NONE) is None
    assert placer.never_fits(Need(100, 11), members) == 109
    assert placer.never_fits(Need(100, 10), members) is None
    assert placer.never_fits(Need(100, 10), members[:1]) is None


def test_suspects_are_avoided_while_there_are_others() -> None:
    placer = Placer("least_loaded")
    members = [member("p-0"), member("d-0"), member("d-1")]
    suspects = frozenset({"d-0"})
    for _ in range(3):
        assert names(placer.place(Need(1, 5), members, suspects)) == ("p-0", "d-1")
    assert names(placer.place(Need(1, 5), members[:2], suspects)) == ("p-0", "d-0")


def test_who_is_not_up_gets_nothing() -> None:
    members = [member("p-0"), member("d-0", up=False), member("m-0", up=False)]
    assert Placer("least_loaded").place(Need(1, 5), members, NONE) is None


def test_a_mixed_worker_takes_what_no_pair_can() -> None:
    members = [member("p-0"), member("d-0", 10), member("m-0")]
    placer = Placer("least_loaded")
    assert names(placer.place(Need(5, 5), members, NONE)) == ("p-0", "d-0")
    assert names(placer.place(Need(50, 5), members, NONE)) == ("-", "m-0")
