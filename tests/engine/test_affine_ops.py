"""Every op that scales or shifts, with what it can be told besides its operands: folded as torch computes it,
or left as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusecli

Op = Callable[[Tensor, Tensor], Tensor]
FOLDED: dict[str, Op] = {
    "add": lambda x, g: x + g,
    "add alpha": lambda x, g: torch.add(x, g, alpha=2),
    "add alpha, reversed": lambda x, g: torch.add(g, x, alpha=2),
    "add alpha, a number": lambda x, g: torch.add(x, 1.5, alpha=2) * g,
    "add_ alpha": lambda x, g: x.clone().add_(g, alpha=2),
    "sub": lambda x, g: x - g,
    "sub alpha": lambda x, g: torch.sub(x, g, alpha=3),
    "sub alpha, reversed": lambda x, g: torch.sub(g, x, alpha=3),
    "sub alpha, a number": lambda x, g: torch.sub(x, 1.5, alpha=2) * g,
    "sub_ alpha": lambda x, g: x.clone().sub_(g, alpha=2),
    "rsub": lambda x, g: torch.rsub(x, g),
    "rsub alpha": lambda x, g: torch.rsub(x, g, alpha=2),
    "rsub alpha, reversed": lambda x, g: torch.rsub(g, x, alpha=2),
    "rsub, a number": lambda x, g: (3.0 - x) * g,
    "mul": lambda x, g: x * g,
    "div": lambda x, g: x / g,
    "neg": lambda x, g: -x * g,
}
LEFT: dict[str, Op] = {
    "div floor": lambda x, g: torch.div(x, g, rounding_mode="floor"),
    "div trunc": lambda x, g: torch.div(x, g, rounding_mode="trunc"),
    "a constant divided": lambda x, g: g / x,
    "addcmul value": lambda x, g: torch.addcmul(x, g, g, value=2),
    "addcmul value, flowing inside": lambda x, g: torch.addcmul(g, x, g, value=2),
    "addcdiv value": lambda x, g: torch.addcdiv(x, g, g, value=2),
    "lerp": lambda x, g: torch.lerp(x, g, 0.3),
    "remainder": lambda x, g: torch.remainder(x, g),
}


class Does(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.g, self.op = nn.Parameter(torch.randn(6, 1, 1) * 2), op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, self.g)


@pytest.mark.parametrize("name", [*FOLDED, *LEFT])
def test_what_torch_computes(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), Does((FOLDED | LEFT)[name]), nn.Conv2d(6, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    outcome = fusecli.fuse(model, x, discover=True)
    assert (outcome.status == "fused") == (name in FOLDED)
    assert not any(no.code == "dropped" for no in outcome.refused)  # a fold that the proof had to stop
    with torch.no_grad():
        assert torch.allclose(outcome.model(x), model(x), atol=1e-4)
