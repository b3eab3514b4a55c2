import pytest
import torch

from baton.engine.plan import SequenceChunk, StepPlan
from baton.engine.step_inputs import StepShape, build_inputs
from baton.protocol.errors import InternalError
from baton.protocol.sampling import SamplingParams

SHAPE = StepShape(vocab_size=100, num_blocks=100, block_size=4, device=torch.device("cpu"))


def decode(seq_id: str, start: int, table: tuple[int, ...]) -> SequenceChunk:
    return SequenceChunk(seq_id, (start % 100,), start, table, True, SamplingParams())


def test_rows_are_packed_decodes_first_and_answers_return_in_plan_order() -> None:
    prompt = SequenceChunk("p", (7, 8, 9), 2, (3, 1), True, SamplingParams())
    silent = SequenceChunk("q", (5, 6), 0, (2,), False, SamplingParams())
    plan = StepPlan(0, (prompt, decode("b", 5, (8, 9)), silent, decode("a", 1, (6,))))
    inputs = build_inputs(plan, SHAPE)
    assert inputs.num_decodes == 2
    assert inputs.token_ids.tolist() == [5, 1, 7, 8, 9, 5, 6]
    assert inputs.positions.tolist() == [5, 1, 2, 3, 4, 0, 1]
    assert inputs.slots.tolist() == [37, 25, 14, 15, 4, 8, 9]
    assert inputs.sample_rows.tolist() == [4, 0, 1]
    assert inputs.block_tables.tolist() == [[8, 9], [6, 0], [3, 1], [2, 0]]
    assert inputs.cu_seqlens_q.tolist() == [0, 1, 2, 5, 7]
    assert inputs.cu_seqlens_prefill.tolist() == [0, 3, 5]
    assert inputs.context_lens.tolist() == [6, 2, 5, 2]


def test_blocks_past_a_chunk_are_not_carried_along() -> None:
    chunk = SequenceChunk("p", (7, 8), 0, (3, 1, 9, 9), False, SamplingParams())
    inputs = build_inputs(StepPlan(0, (chunk,)), SHAPE)
    assert inputs.block_tables.tolist() == [[3]]
    assert inputs.sample_rows.tolist() == []


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (SequenceChunk("x", (), 0, (1,), True, SamplingParams()), "without tokens"),
        (SequenceChunk("x", (1,), 4, (1,), True, SamplingParams()), "positions up to 4"),
        (SequenceChunk("x", (1,), -1, (1,), True, SamplingParams()), "positions up to -1"),
        (SequenceChunk("x", (1,), 0, (100,), True, SamplingParams()), "0 to 99"),
        (SequenceChunk("x", (1,), 0, (-1,), True, SamplingParams()), "0 to 99"),
        (SequenceChunk("x", (1, 100), 0, (1,), True, SamplingParams()), "0 to 99"),
    ],
)
def test_a_chunk_that_cannot_run_is_named(chunk: SequenceChunk, reason: str) -> None:
    with pytest.raises(InternalError, match=reason) as caught:
        build_inputs(StepPlan(0, (decode("a", 1, (6,)), chunk)), SHAPE)
    assert caught.value.request_id == "x"


def test_a_sequence_runs_once_in_a_step() -> None:
    plan = StepPlan(0, (decode("a", 1, (6,)), decode("a", 1, (6,))))
    with pytest.raises(InternalError, match="twice"):
        build_inputs(plan, SHAPE)
