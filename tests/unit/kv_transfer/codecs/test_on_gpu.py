"""``gpu_parity`` where there is a GPU: the same tests, and real shapes among them."""

from __future__ import annotations

import pytest

from tests.unit.kv_transfer.codecs.gpu_parity import *  # noqa: F403

pytestmark = pytest.mark.gpu
