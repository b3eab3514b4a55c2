"""The list of kept blocks against an ordered dict."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.kept_blocks import KeptBlocks


@given(st.lists(st.integers(-1, 5), max_size=40))
def test_the_one_unused_for_longest_is_the_first_to_go(turns: list[int]) -> None:
    """Each turn: -1 takes the oldest, else the block comes or goes."""
    kept, model = KeptBlocks(6), OrderedDict[int, None]()
    for block in turns:
        if block >= 0:
            if block in model:
                kept.remove(block)
                del model[block]
            else:
                kept.append(block)
                model[block] = None
        elif model:
            assert kept.pop_oldest() == model.popitem(last=False)[0]
        assert list(kept) == list(model)
        assert len(kept) == len(model)


def test_what_is_not_there_is_refused() -> None:
    kept = KeptBlocks(3)
    with pytest.raises(AssertionError):
        kept.pop_oldest()
    with pytest.raises(AssertionError, match="block 1 is not kept"):
        kept.remove(1)
    kept.append(1)
    with pytest.raises(AssertionError, match="block 1 is kept already"):
        kept.append(1)
    kept.remove(1)
    assert list(kept) == []
