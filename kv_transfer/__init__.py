"""KV bytes between pools: frames, the two ends of a hand-over, and what carries them.

``sender`` and ``receiver`` decide and do no I/O; ``pusher`` and ``puller`` frame what
``transports`` carry. Knows a model only as data (``baton.protocol.layout``).
"""
