"""What a device is given, and that both sides of every operation are called alike."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from baton.engine.kernels import registry
from baton.engine.kernels.registry import REFERENCES, TRITON, Kernels, kernels_for
from baton.protocol.errors import ConfigError

OPERATIONS = [field.name for field in fields(Kernels)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_reference_and_kernel_have_one_signature(name: str) -> None:
    reference, kernel = getattr(REFERENCES, name), getattr(TRITON, name)
    assert reference is not kernel
    assert reference.__name__ == f"{name}_reference"
    assert kernel.__name__ == f"{name}_triton"
    assert inspect.signature(reference) == inspect.signature(kernel)


def test_gpus_get_kernels_and_cpus_get_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "AVAILABLE", True)
    assert kernels_for(torch.device("cuda:1")) is TRITON
    assert kernels_for(torch.device("cpu")) is REFERENCES


def test_a_gpu_without_triton_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "AVAILABLE", False)
    assert kernels_for(torch.device("cpu")) is REFERENCES
    with pytest.raises(ConfigError, match=r"no Triton.*placement\.device to cpu"):
        kernels_for(torch.device("cuda"))


@pytest.mark.skipif(torch.version.cuda is not None, reason="a CUDA build of torch brings Triton")
def test_a_cpu_process_does_not_import_triton() -> None:
    code = "import sys; import baton.engine.kernels.registry; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
