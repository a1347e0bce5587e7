"""What every rule is held against: the float64 meaning of the chain, and torch.ao on the same chain."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusecli import fuse_modules
from tests.nets import float64


def names(net: nn.Module) -> list[str]:
    return [name for name, _ in net.named_children()]


def kinds(net: nn.Module) -> list[str]:
    """The class names of everything in the network, in order."""
    return [type(module).__name__ for module in net.modules()]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square, so that a single lucky element decides nothing."""
    assert actual.shape == expected.shape
    return float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())


def assert_exact(net: nn.Module, x: Tensor, group: list[str] | None = None) -> Any:
    """In float64 the fused net is the same function to rounding; returns it, fused in its own dtype."""
    group = group or names(net)
    expected = float64(net)(x.double())
    assert relative_error(fuse_modules(float64(net), group)(x.double()), expected) < 1e-12
    return fuse_modules(net, group)


def assert_like_torch_ao(torch_ao: Any, net: nn.Module, x: Tensor) -> None:
    """Same classes at the same places, same keys, and weights that are at least as near to the exact ones."""
    ours, theirs = assert_exact(net, x), torch_ao(net, names(net))
    assert kinds(ours) == kinds(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours = fuse_modules(net, names(net))
    expected = float64(net)(x.double())
    ours_error, their_error = (
        relative_error(float64(fused)(x.double()), expected) for fused in (ours, theirs)
    )
    assert ours_error <= their_error < 1e-6
    assert relative_error(ours(x), expected) < 1e-6


def assert_hooks_run_once(net: nn.Module, x: Tensor) -> None:
    """The pre-hook of the first and the forward hook of the last are called once each, in that order."""
    calls: list[str] = []
    first, *_, last = net.children()
    first.register_forward_pre_hook(lambda *_: calls.append("pre"))
    last.register_forward_hook(lambda *_, **__: calls.append("post"), with_kwargs=True)
    fuse_modules(net, names(net))(x)
    assert calls == ["pre", "post"]
