"""KV bytes between pools: frames, the two ends of a hand-over, and what carries them.

``frames``, ``sender`` and ``receiver`` decide and do no I/O; ``zeromq`` moves bytes. Knows a
model only as data (``baton.protocol.layout``).
"""
