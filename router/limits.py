"""Caps on everything that a client can make large. Both servers read them here.

Limits that belong to sampling itself (n, logprobs, stop strings) live in
``baton.protocol.sampling`` and are re-read, not repeated.
"""

from __future__ import annotations

MAX_BODY_BYTES = 1 * 2**20
"""Of one HTTP request. A gRPC message may be larger (see the server's own cap)."""

MAX_JSON_DEPTH = 64
MAX_JSON_KEYS = 5_000
MAX_JSON_CONTAINERS = 5_000
"""Lists and objects together."""

MAX_DISCARDED_BYTES = 16 * 2**20
"""Read and dropped of a body over its cap, so that the client gets to see the answer."""

BODY_TIMEOUT_S = 30.0
MAX_CONNECTIONS = 4_096

MAX_MESSAGES = 1_024
MAX_ROLE_CHARS = 32
MAX_PROMPT_BATCH = 64
"""Prompts in one completion request."""

MAX_CHOICES_PER_REQUEST = 64
"""Prompts x n in one completion request."""

MAX_LOGPROBS_PER_REQUEST = 262_144
"""Prompts x n x (prompt tokens x (prompt_logprobs + 1) + max_tokens x (logprobs + 1)): about 17 MB
of JSON."""

INLINE_LOGPROBS = 1_024
"""Larger pieces of an answer (above 1 to 4 ms of building) leave the event loop for a thread."""

MAX_PROMPT_CHARS = 4 * 2**20
"""Beyond it a prompt is never handed to the tokeniser, whatever the model's length."""

INLINE_ECHO_IDS = 1_024
"""Longer prompts leave the event loop when each echoed token is to have its own text."""

MAX_MODEL_NAME_CHARS = 256
MAX_CACHE_SALT_CHARS = 256
MAX_PRIORITY = 1_000
"""Priorities run from -MAX_PRIORITY to MAX_PRIORITY."""

INLINE_TOKENISE_CHARS = 16_384
"""Longer prompts (about 15 ms of tokenising) leave the event loop for a thread."""
