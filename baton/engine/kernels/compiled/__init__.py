"""CPU kernels in C++, compiled for the machine they run on at first use and kept on disk.

An output element is always one chain of operations in one order, whatever is computed beside
it: results are bitwise the same for any batch, chunking and number of threads.
"""
