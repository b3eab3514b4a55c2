"""What a worker refuses before it takes a request in. Pure.

The router has validated it all; a worker does not rely on that, for one token id outside
the vocabulary would cost every request of the step that runs it.
"""

from __future__ import annotations

from baton.engine.block_pool import BlockPool
from baton.protocol.errors import InvalidRequest
from baton.protocol.messages import RequestBody


def refusal(body: RequestBody, kv_tokens: int, pool: BlockPool, vocab_size: int) -> str:
    """The reason why the request can never run in ``pool``; empty when it can.

    kv_tokens: the most tokens whose KV this worker must hold at once for it.
    """
    if not body.prompt_ids:
        return "the prompt has no tokens"
    if max(body.prompt_ids) >= vocab_size or max(body.output_ids, default=0) >= vocab_size:
        return f"token ids must be below the vocabulary's {vocab_size}"
    if body.sampling.max_listed_token_id >= vocab_size:
        return f"token ids of sampling parameters must be below the vocabulary's {vocab_size}"
    if len(set(body.sampling.bad_token_ids)) >= vocab_size:
        return "bad_token_ids leave no token to draw"
    if len(body.output_ids) >= body.sampling.max_tokens:
        return f"{len(body.output_ids)} tokens are there already, max_tokens is reached"
    if pool.blocks_for(kv_tokens) > pool.num_blocks:
        capacity = pool.num_blocks * pool.block_size
        return f"KV of {kv_tokens} tokens never fits into the pool's {capacity}"
    try:
        body.sampling.validate()
    except InvalidRequest as exc:
        return exc.message
    return ""
