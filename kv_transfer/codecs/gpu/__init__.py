"""Codecs for KV on a GPU, in Triton: the same streams as the host's, bit for bit.

``codecs`` makes one by name; the other files are kernels over all runs (K or V of a layer) of a
frame at once. Importing this package imports torch.
"""
