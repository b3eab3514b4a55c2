"""What prefill and decode workers have in common: token outbox, router leases, the shell.

``events``, ``outbox`` and ``router_leases`` are pure; ``shell`` is the asyncio around a decider.
"""
