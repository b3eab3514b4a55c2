"""Tensor parallelism: one model over several processes, each with a part of every layer.

Rank 0 is the worker's own process: it has the scheduler, the sockets and the sampling. The
other ranks are its children and do what it tells them.
"""
