from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from baton.engine.kernels.compiled.library import load_library
from baton.engine.models.backend import Backend
from baton.engine.models.compiled_backend import CompiledBackend
from baton.engine.models.experts import mix_experts
from baton.engine.models.model import ExpertMlp
from baton.engine.models.torch_backend import TorchBackend

HIDDEN, INNER = 24, 10

BACKENDS: dict[str, Callable[[], Backend]] = {
    "compiled": lambda: CompiledBackend(load_library(1)),
    "torch": lambda: TorchBackend(torch.device("cpu"), deterministic=False),
    "torch, deterministic": lambda: TorchBackend(torch.device("cpu"), deterministic=True),
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return BACKENDS[request.param]()


class Weights:
    def __init__(self, num_experts: int = 5, num_chosen: int = 2, *, normalized: bool = True):
        torch.manual_seed(1)
        self.router = torch.randn(num_experts, HIDDEN)
        self.gate_up = torch.randn(num_experts, 2 * INNER, HIDDEN)
        self.down = torch.randn(num_experts, HIDDEN, INNER)
        self.num_chosen = num_chosen
        self.normalized = normalized

    def on(self, backend: Backend) -> ExpertMlp:
        return ExpertMlp(
            router=backend.product(self.router.clone(), None),
            gate_up=backend.grouped(self.gate_up.clone(), "silu"),
            down=backend.grouped(self.down.clone(), None),
            num_chosen=self.num_chosen,
            normalized=self.normalized,
        )

    def one_row(self, row: Tensor) -> Tensor:
        probabilities = (self.router @ row).softmax(dim=0)
        best = probabilities.sort(descending=True).indices[: self.num_chosen].tolist()
        total = sum(probabilities[n] for n in best) if self.normalized else 1.0
        out = torch.zeros(HIDDEN)
        for n in best:
            gate, up = (self.gate_up[n] @ row).chunk(2)
            out += probabilities[n] / total * (self.down[n] @ (silu(gate) * up))
        return out


def random_rows(count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "weights", [Weights(), Weights(normalized=False), Weights(3, 3), Weights(1, 1)]
)
def test_rows_get_what_their_own_experts_give(backend: Backend, weights: Weights) -> None:
    rows = random_rows(37)
    expected = torch.stack([weights.one_row(row) for row in rows])
    mixed = mix_experts(rows, weights.on(backend))
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["compiled", "torch, deterministic"])
def test_neighbours_do_not_change_a_row(name: str) -> None:
    mlp = Weights().on(BACKENDS[name]())
    rows = random_rows(64)
    together = mix_experts(rows, mlp)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    assert torch.equal(mix_experts(rows[order], mlp), together[order])
    for n in (0, 13, 63):
        assert torch.equal(mix_experts(rows[n : n + 1], mlp)[0], together[n])
