"""What a block of KV looks like, as data: both ends of a transfer must agree on it.

The bytes of one hand-over frame are a C-contiguous array of shape
``[layers, 2 (K, V), tokens, kv_heads, head_dim]``. Block size is a private matter of each
side: frames are cut by tokens.
"""

from __future__ import annotations

import hashlib

import msgspec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LAYOUT_VERSION = 1


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """model_digest: identifies weights and config, so that only equal models exchange KV.

    arithmetic: in deterministic mode the class of workers whose results agree to the bit
    (kernels, machine, libraries, tensor parallelism); otherwise empty.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    model_digest: str
    arithmetic: str = ""
    version: int = LAYOUT_VERSION

    @property
    def bytes_per_token(self) -> int:
        """Over all layers, K and V."""
        return self.num_layers * self.bytes_per_token_layer

    @property
    def bytes_per_token_layer(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    def fingerprint(self) -> str:
        """16 hex digits; equal exactly when every field is equal."""
        fields = "|".join(f"{k}={v}" for k, v in sorted(msgspec.to_builtins(self).items()))
        return hashlib.blake2b(fields.encode(), digest_size=8).hexdigest()
