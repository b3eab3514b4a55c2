"""Checkpoint folders as data: where they are, what model they hold, and its identity.

Imports no torch, because the router reads a model's limits from here.
"""
