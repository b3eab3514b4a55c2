"""The engine's operations: per file a contract, a plain-torch reference and a Triton kernel.

``registry.kernels_for(device)`` hands them out; nobody else asks which device it is on.
"""
