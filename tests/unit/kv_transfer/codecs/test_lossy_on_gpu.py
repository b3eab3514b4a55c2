"""``gpu_lossy_parity`` where there is a GPU: the same tests, on longer frames."""

from __future__ import annotations

import pytest

from tests.unit.kv_transfer.codecs.gpu_lossy_parity import *  # noqa: F403

pytestmark = pytest.mark.gpu
