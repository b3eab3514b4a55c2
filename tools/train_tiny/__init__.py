"""Trains a small Llama-architecture model on the running Python's standard library sources.

    python -m tools.train_tiny --out my-tiny            # hours on CPUs, minutes on a GPU
    python -m tools.train_tiny --out my-tiny --smoke    # about a minute, to see that it works

The same seed, Python, torch, device and number of threads give the same files.
"""
