"""The few calls of the CUDA driver that sharing device memory between processes takes.

By ctypes, from the library that every driver brings: neither torch nor the CUDA runtime has
them as public functions. Pointers are integers. Everything raises OSError on failure.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

import torch

HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1


class Driver(Protocol):
    def host_memory(self, num_bytes: int) -> memoryview:
        """Page-locked, freed with its last view."""
        ...

    def allocate(self, num_bytes: int) -> int: ...

    def free(self, pointer: int) -> None: ...

    def export(self, pointer: int) -> bytes:
        """A handle of HANDLE_BYTES that another process of this host can ``open``."""
        ...

    def open(self, handle: bytes) -> int: ...

    def close(self, pointer: int) -> None: ...

    def to_device(self, pointer: int, host: memoryview) -> None:
        """Done on return, for any process that has the memory open."""
        ...

    def to_host(self, host: memoryview, pointer: int) -> None: ...


class _Handle(ctypes.Structure):
    """A type of its own: the driver takes it by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class CudaDriver:
    """On the current device of torch, whose context it uses."""

    def __init__(self) -> None:
        # Makes torch's context the calling thread's, which all later calls come from.
        torch.zeros(1, device="cuda")
        self._cuda = ctypes.CDLL("libcuda.so.1")

    def host_memory(self, num_bytes: int) -> memoryview:
        memory: memoryview = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy().data
        return memory

    def allocate(self, num_bytes: int) -> int:
        pointer = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        return pointer.value

    def free(self, pointer: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(pointer))

    def export(self, pointer: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(pointer))
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        pointer = ctypes.c_uint64()
        own = _Handle.from_buffer_copy(handle)
        flags = ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), own, flags)
        return pointer.value

    def close(self, pointer: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))

    def to_device(self, pointer: int, host: memoryview) -> None:
        if host.nbytes:
            size = ctypes.c_size_t(host.nbytes)
            self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), _address(host), size)
            self._call("cuCtxSynchronize")

    def to_host(self, host: memoryview, pointer: int) -> None:
        if host.nbytes:
            size = ctypes.c_size_t(host.nbytes)
            self._call("cuMemcpyDtoH_v2", _address(host), ctypes.c_uint64(pointer), size)

    def _call(self, name: str, *args: object) -> None:
        code = getattr(self._cuda, name)(*args)
        if code != 0:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorName(code, ctypes.byref(text))
            raise OSError(f"{name}: {(text.value or b'unknown').decode()} ({code})")


def _address(host: memoryview) -> ctypes.c_void_p:
    return ctypes.c_void_p(ctypes.addressof(ctypes.c_ubyte.from_buffer(host)))
