"""Model execution shared by both workers: one synchronous forward step on a pool of KV blocks.

No sockets, no asyncio. ``block_pool``, ``scheduler`` and ``plan`` are pure and import no torch;
``executor`` runs a ``StepPlan`` on the model.
"""
