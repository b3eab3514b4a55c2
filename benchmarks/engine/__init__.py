"""The engine alone, beside other engines, on one machine: ``python -m benchmarks.engine --help``.

The modules that engine processes run (``answer``, ``run_*``) keep to the standard library and the
one engine they drive: each runs in its own environment.
"""
