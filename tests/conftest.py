"""What every test relies on."""

from __future__ import annotations

import gc
import signal

import pytest

# A shell starts background jobs with SIGINT ignored, and children inherit that: tests that
# press Ctrl-C would then wait for an answer that never comes.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is imported by now stays to the end. Walking it again at every collection, as Python
    would, is a quarter of the time of all tests: some collect to see what is left."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` run where there is a CUDA device and are deselected elsewhere."""
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in set(marked)]
