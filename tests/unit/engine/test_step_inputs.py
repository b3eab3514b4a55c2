import torch

from baton.engine.plan import SequenceChunk, StepPlan
from baton.engine.step_inputs import StepShape, build_inputs
from baton.protocol.sampling import SamplingParams

SHAPE = StepShape(
    vocab_size=100,
    num_blocks=100,
    block_size=4,
    windows=(None, 6),
    mask_dtype=torch.float32,
    device=torch.device("cpu"),
)
NULL = 400


def decode(seq_id: str, start: int, table: tuple[int, ...]) -> SequenceChunk:
    return SequenceChunk(seq_id, (start % 100,), start, table, True, SamplingParams())


def test_rows_are_packed_decodes_first_and_answers_return_in_plan_order() -> None:
    prompt = SequenceChunk("p", (7, 8, 9), 2, (3, 1), True, SamplingParams())
    silent = SequenceChunk("q", (5, 6), 0, (2,), False, SamplingParams())
    plan = StepPlan(0, (prompt, decode("b", 5, (8, 9)), silent, decode("a", 1, (6,))))
    inputs = build_inputs(plan, SHAPE)
    assert inputs.token_ids.tolist() == [1, 5, 7, 8, 9, 5, 6]
    assert inputs.positions.tolist() == [1, 5, 2, 3, 4, 0, 1]
    assert inputs.slots.tolist() == [25, 37, 14, 15, 4, 8, 9]
    assert inputs.sample_rows.tolist() == [4, 1, 0]
    assert set(inputs.attention) == {None, 6}


def test_decodes_are_padded_to_the_null_slot() -> None:
    plan = StepPlan(0, (decode("a", 1, (6,)), decode("b", 5, (8, 9))))
    (group,) = build_inputs(plan, SHAPE).attention[None].decode
    assert group.slots.view(2, 6).tolist() == [
        [24, 25, NULL, NULL, NULL, NULL],
        [32, 33, 34, 35, 36, 37],
    ]
    assert group.mask is not None
    assert (group.mask[:, 0, 0] == 0).tolist() == [[True] * 2 + [False] * 4, [True] * 6]


def test_a_window_reads_only_what_it_sees() -> None:
    plan = StepPlan(0, (decode("a", 13, (5, 6, 7, 8)),))
    (group,) = build_inputs(plan, SHAPE).attention[6].decode
    assert group.slots.tolist() == [28, 29, 30, 31, 32, 33][-6:]
    assert group.mask is None


def test_unlike_contexts_are_not_padded_to_the_longest() -> None:
    lengths = [10, 100, 128, 129, 250, 258, 259, 390]
    chunks = tuple(decode(str(n), n - 1, tuple(range(100))) for n in reversed(lengths))
    index = build_inputs(StepPlan(0, chunks), SHAPE).attention[None]
    assert [(g.first_row, g.num_rows) for g in index.decode] == [(0, 3), (3, 3), (6, 2)]
    assert [len(g.slots) // g.num_rows for g in index.decode] == [128, 258, 390]


def test_a_prompt_from_zero_needs_neither_cache_nor_mask() -> None:
    prompt = SequenceChunk("p", tuple(range(6)), 0, (3, 1), True, SamplingParams())
    longer = SequenceChunk("q", tuple(range(7)), 0, (4, 5), True, SamplingParams())
    inputs = build_inputs(StepPlan(0, (prompt, longer)), SHAPE)
    plain, windowed = inputs.attention[None].prefill, inputs.attention[6].prefill
    assert [t.mask is None for t in plain] == [True, True]
    assert [t.slots is None for t in windowed] == [True, False]
    mask = windowed[1].mask
    assert mask is not None
    seen = (mask == 0).tolist()
    assert seen[6] == [False, True, True, True, True, True, True]
    assert seen[2] == [True, True, True, False, False, False, False]
