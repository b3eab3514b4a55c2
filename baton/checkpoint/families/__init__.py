"""The model families that run, by ``model_type``. A family says what its config means.

All share one decoder (``baton.engine.models``); a new family that needs no new arithmetic is
one more file here.
"""

from baton.checkpoint.families.biases import Biases
from baton.checkpoint.families.family import ExpertSpec, Family, Scales
from baton.checkpoint.families.gemma2 import GEMMA2
from baton.checkpoint.families.gemma3 import GEMMA3
from baton.checkpoint.families.llama import LLAMA
from baton.checkpoint.families.mistral import MISTRAL
from baton.checkpoint.families.mixtral import MIXTRAL
from baton.checkpoint.families.names import TensorNames
from baton.checkpoint.families.phi3 import PHI3
from baton.checkpoint.families.qwen2 import QWEN2
from baton.checkpoint.families.qwen3 import QWEN3
from baton.checkpoint.families.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {
    f.name: f for f in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, PHI3, GEMMA2, GEMMA3)
}

__all__ = ["FAMILIES", "Biases", "ExpertSpec", "Family", "Scales", "TensorNames"]
