"""Tiny networks, each with one thing to quantize, and the same in textbook integers, written in float64.

`integers(t, x)` of a network rounds every value that int8 hardware would hold as integers: `t.value(name, v)`
an activation, `t.weight(name)` a weight. Scales and zero points are those of the quantized graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fusecli
from fusecli.int8.packed import packed
from fusecli.int8.quantize import Quantized


class Textbook:
    """q = clamp(round(v / s) + z), and back: (q - z) s. All in float64, from the float weights."""

    def __init__(self, quantized: Quantized, model: nn.Module) -> None:
        self.scales, _ = packed(quantized)
        self.model = model

    def value(self, name: str, value: Tensor) -> Tensor:
        scale, zero_point = (
            self.scales[f"{name}.output.scale"].double(),
            self.scales[f"{name}.output.zero_point"],
        )
        return (torch.clamp(torch.round(value / scale) + zero_point, 0, 255) - zero_point) * scale

    def weight(self, layer: str, axis: int = 0) -> Tensor:
        weight = self.model.get_parameter(f"{layer}.weight").detach().double()
        scale = self.scales[f"{layer}.weight.scale"].double()
        if scale.numel() > 1:
            scale = scale.view([-1 if dim == axis else 1 for dim in range(weight.ndim)])
        return torch.clamp(torch.round(weight / scale), -127, 127) * scale

    def bias(self, layer: str) -> Tensor:
        return self.model.get_parameter(f"{layer}.bias").detach().double()


class Conv(nn.Module):
    SHAPE = (2, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        x = t.value("x", x)
        return t.value("conv", F.conv2d(x, t.weight("conv"), t.bias("conv"), padding=1))


class ConvReLU(Conv):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x), inplace=True)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        x = t.value("x", x)
        return t.value("conv", F.conv2d(x, t.weight("conv"), t.bias("conv"), padding=1).clamp(0))


class ConvReLU6(Conv):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU6(inplace=True)
        self.conv.weight.data *= 12

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        x = t.value("x", x)
        return t.value("conv", F.conv2d(x, t.weight("conv"), t.bias("conv"), padding=1).clamp(0, 6))


def folded(model: nn.Module, *groups: list[str]) -> nn.Module:
    """The network with statistics that matter, its norms folded by fusecli."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    fused = fusecli.fuse_modules(model.eval(), [list(group) for group in groups])
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    return fused


class ConvBN(Conv):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class ConvBNReLU(ConvReLU):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(5)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Linear(nn.Module):
    SHAPE = (4, 7)

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        return t.value("linear", t.value("x", x) @ t.weight("linear").T + t.bias("linear"))


class LinearReLU(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        return t.value("linear", (t.value("x", x) @ t.weight("linear").T + t.bias("linear")).clamp(0))


class Pair(nn.Module):
    """Two layers side by side."""

    SHAPE = (2, 3, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 5, 3, bias=False)
        self.b = nn.Conv2d(3, 5, 3, bias=False)

    def both(self, t: Textbook, x: Tensor) -> tuple[Tensor, Tensor]:
        x = t.value("x", x)
        return t.value("a", F.conv2d(x, t.weight("a"))), t.value("b", F.conv2d(x, t.weight("b")))


class Add(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        a, b = self.both(t, x)
        return t.value("add", a + b)


class AddReLU(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        return F.relu_(y)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        a, b = self.both(t, x)
        return t.value("relu", (a + b).clamp(0))


class Mul(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        a, b = self.both(t, x)
        return t.value("mul", a * b)


class Cat(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x), 3 * self.b(x), self.a(x)], 1)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        a, b = self.a_of(t, x), 3 * t.value("b", F.conv2d(t.value("x", x), t.weight("b")))
        return t.value("cat", torch.cat([a[0], t.value("mul", b), a[1]], 1))

    def a_of(self, t: Textbook, x: Tensor) -> tuple[Tensor, Tensor]:
        a = F.conv2d(t.value("x", x), t.weight("a"))
        return t.value("conv2d", a), t.value("conv2d_2", a)


class ReLUAlone(Conv):
    """In place, the activation changes what the other reader of the layer gets: it reads the activation."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = F.relu_(y)
        return y + z

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        y = F.conv2d(t.value("x", x), t.weight("conv"), t.bias("conv"), padding=1).clamp(0)
        return t.value("add", 2 * t.value("conv", y))


class ReLUBeside(Conv):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(y) + y

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        y = t.value("conv", F.conv2d(t.value("x", x), t.weight("conv"), t.bias("conv"), padding=1))
        return t.value("add", t.value("relu", y.clamp(0)) + y)


class Pools(Conv):
    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.conv(x), 2, 1)
        y = F.interpolate(F.pad(F.avg_pool2d(y, 2, 1), (1, 1)), scale_factor=2)
        return F.adaptive_avg_pool2d(y, 2).flatten(1).transpose(0, 1)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        def same(value: Tensor) -> Tensor:
            return t.value("conv", value)

        y = same(F.conv2d(t.value("x", x), t.weight("conv"), t.bias("conv"), padding=1))
        y = same(F.avg_pool2d(F.max_pool2d(y, 2, 1), 2, 1))
        y = F.interpolate(F.pad(y, (1, 1)), scale_factor=2)
        return same(F.adaptive_avg_pool2d(y, 2)).flatten(1).T


class Depthwise(nn.Module):
    SHAPE = (2, 4, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, groups=4, bias=False)
        self.conv.weight.data *= torch.tensor([1.0, 10.0, 0.1, 0.0]).view(4, 1, 1, 1)  # one channel is dead

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        return t.value("conv", F.conv2d(t.value("x", x), t.weight("conv"), groups=4))


class Conv1d(nn.Module):
    SHAPE = (2, 3, 9)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding="same", dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean(2)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        y = F.conv1d(t.value("x", x), t.weight("conv"), t.bias("conv"), padding=2, dilation=2)
        return t.value("conv", t.value("conv", y).mean(2))


class Conv3d(nn.Module):
    SHAPE = (2, 2, 4, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        return t.value("conv", F.conv3d(t.value("x", x), t.weight("conv"), t.bias("conv")))


class ConvTranspose(nn.Module):
    SHAPE = (2, 4, 4, 4)
    GROUPS = 1

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=self.GROUPS)
        self.conv.weight.data *= torch.logspace(-1, 1, 6 // self.GROUPS).view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        weight = t.weight("conv", axis=1)
        y = F.conv_transpose2d(t.value("x", x), weight, t.bias("conv"), stride=2, groups=self.GROUPS)
        return t.value("conv", y)


class GroupedTranspose(ConvTranspose):
    GROUPS = 2


class SharedWeight(nn.Module):
    """One layer that is called twice, and another with the same weight."""

    SHAPE = (4, 5)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(5, 5), nn.Linear(5, 5)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(self.one(x)))

    def integers(self, t: Textbook, x: Tensor) -> Tensor:
        weight = t.weight("other").T  # the last of its names
        y = t.value("linear", t.value("x", x) @ weight + t.bias("one"))
        y = t.value("linear_1", y @ weight + t.bias("one"))
        return t.value("other", y @ weight + t.bias("other"))


NETS: dict[str, type[nn.Module]] = {
    net.__name__: net
    for net in (
        *(
            Conv,
            ConvReLU,
            ConvReLU6,
            ConvBN,
            ConvBNReLU,
            Linear,
            LinearReLU,
            Add,
            AddReLU,
            Mul,
            Cat,
            ReLUAlone,
        ),
        *(ReLUBeside, Pools, Depthwise, Conv1d, Conv3d, ConvTranspose, GroupedTranspose, SharedWeight),
    )
}


def built(name: str) -> nn.Module:
    """The network of that name: seeded, in inference mode, its norms folded."""
    torch.manual_seed(len(name))
    model = NETS[name]().eval()
    return folded(model, ["conv", "bn"]) if name.startswith("ConvBN") else model
