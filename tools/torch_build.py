"""Says in one line which build of torch the environment holds."""

from importlib.metadata import version

import torch

build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
print(f"torch {version('torch')} ({build} build), {torch.get_num_threads()} threads by default")
