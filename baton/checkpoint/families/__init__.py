"""The model families that run, by ``model_type``. A family says what its config means.

All share one decoder (``baton.engine.models``); a new family that needs no new arithmetic is
one more file here.
"""

from baton.checkpoint.families.family import Biases, Family
from baton.checkpoint.families.llama import LLAMA
from baton.checkpoint.families.mistral import MISTRAL
from baton.checkpoint.families.qwen2 import QWEN2
from baton.checkpoint.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {f.name: f for f in (LLAMA, MISTRAL, QWEN2, QWEN3)}

__all__ = ["FAMILIES", "Biases", "Family"]
