"""Small transformers, wired as their authors wire them. It needs nothing but torch: tests copy it beside a
checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, WORDS, LENGTH = 8, 4, 11, 5
Make = Callable[[], nn.Module]


class LlamaRMSNorm(nn.Module):
    """Computes in float32, scales in the dtype that it was given."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * x.to(dtype)


class GemmaRMSNorm(nn.Module):
    """Its weight is the gain less 1, and it scales in float32."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    """[n, l, c] to [n, h, l, d]."""
    n, length, _ = x.shape
    return x.view(n, length, count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    n, _, length, _ = x.shape
    return x.transpose(1, 2).reshape(n, length, -1)


class Attention(nn.Module):
    """Three layers read the same tokens."""

    def __init__(self, bias: bool = False, groups: int = HEADS, how: str = "interleave") -> None:
        super().__init__()
        inner = WIDTH // HEADS * groups
        self.groups, self.how = groups, how
        self.q, self.k, self.v = (nn.Linear(WIDTH, size, bias) for size in (WIDTH, inner, inner))
        self.out = nn.Linear(WIDTH, WIDTH, bias)

    def forward(self, x: Tensor) -> Tensor:
        q = heads(self.q(x))
        k, v = (self.repeated(heads(layer(x), self.groups)) for layer in (self.k, self.v))
        y: Tensor = self.out(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return y

    def repeated(self, x: Tensor) -> Tensor:
        """Each head as often as queries read it."""
        times = HEADS // self.groups
        if times == 1:
            return x
        if self.how == "interleave":
            return x.repeat_interleave(times, dim=1)
        n, count, length, size = x.shape
        return x[:, :, None].expand(n, count, times, length, size).reshape(n, count * times, length, size)


class FusedAttention(nn.Module):
    """One layer gives queries, keys and values."""

    def __init__(self, how: str = "chunk") -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        if self.how == "view":
            n, length, _ = x.shape
            q, k, v = qkv.view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = qkv.split(WIDTH, -1) if self.how == "split" else qkv.chunk(3, -1)
            q, k, v = map(heads, parts)
        y: Tensor = self.out(joined((q @ k.transpose(-1, -2) / 1.4).softmax(-1) @ v))
        return y


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 12), nn.GELU(), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 12, bias=False), nn.Linear(WIDTH, 12, bias=False)
        self.down = nn.Linear(12, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class PreNorm(nn.Module):
    def __init__(self, norm: Make, attention: Make, mlp: Make) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(), attention(), norm(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class PostNorm(PreNorm):
    """What a norm gives goes past the next layers too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x))
        y: Tensor = self.norm2(x + self.mlp(x))
        return y


class Parallel(nn.Module):
    """Attention and MLP read one norm."""

    def __init__(self, norm: Make, attention: Make, mlp: Make) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = norm(), attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result: Tensor = x + self.attention(y) + self.mlp(y)
        return result


class Scaled(PreNorm):
    """A block of a vision transformer, with LayerScale."""

    def __init__(self, norm: Make, attention: Make, mlp: Make) -> None:
        super().__init__(norm, attention, mlp)
        self.scale1, self.scale2, self.drop = LayerScale(), LayerScale(), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.scale1(self.attention(self.norm1(x))))
        y: Tensor = x + self.drop(self.scale2(self.mlp(self.norm2(x))))
        return y


class LanguageModel(nn.Module):
    """Words and their places in, a word out."""

    def __init__(
        self,
        block: Callable[[Make, Make, Make], nn.Module],
        norm: Make,
        attention: Make,
        mlp: Make,
        *,
        tied: bool = False,
        final: bool = True,
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(block(norm, attention, mlp) for _ in range(2))
        self.norm = norm() if final else nn.Identity()
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words) + self.places(torch.arange(words.shape[1], device=words.device))
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(self.norm(x))
        return y


class ConvNeXtBlock(nn.Module):
    """gamma is a plain parameter of the block."""

    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(WIDTH, WIDTH, 7, padding=3, groups=WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        result: Tensor = x + y.permute(0, 3, 1, 2)
        return result


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, WIDTH, 2, 2), nn.LayerNorm(WIDTH)
        self.blocks = nn.Sequential(ConvNeXtBlock(), ConvNeXtBlock())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y: Tensor = self.head(self.norm(self.blocks(x).mean((-2, -1))))
        return y


class VisionTransformer(nn.Module):
    """Patches, a class token, blocks; the class token is what the head reads."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.cls = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.blocks = nn.Sequential(
            *(Scaled(layer_norm, lambda: FusedAttention("view"), Mlp) for _ in range(2))
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.places
        y: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return y


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def unbiased_layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH, bias=False)


def rms_norm() -> nn.Module:
    return nn.RMSNorm(WIDTH)


def grouped(how: str) -> Make:
    return lambda: Attention(groups=2, how=how)


def fused(how: str) -> Make:
    return lambda: FusedAttention(how)


# Every variant whose gains all fold.
FOLDED: dict[str, Make] = {
    "layer norm": lambda: LanguageModel(PreNorm, layer_norm, lambda: Attention(True), Mlp),
    "layer norm, no bias": lambda: LanguageModel(PreNorm, unbiased_layer_norm, Attention, GatedMlp),
    "rms norm": lambda: LanguageModel(PreNorm, rms_norm, Attention, GatedMlp),
    "llama": lambda: LanguageModel(PreNorm, LlamaRMSNorm, grouped("interleave"), GatedMlp),
    "gemma": lambda: LanguageModel(PreNorm, GemmaRMSNorm, grouped("expand"), GatedMlp),
    "qkv in one, chunk": lambda: LanguageModel(PreNorm, layer_norm, fused("chunk"), Mlp),
    "qkv in one, split": lambda: LanguageModel(PreNorm, rms_norm, fused("split"), Mlp),
    "qkv in one, view": lambda: LanguageModel(PreNorm, layer_norm, fused("view"), GatedMlp),
    "parallel": lambda: LanguageModel(Parallel, layer_norm, Attention, Mlp),
    "parallel, gated": lambda: LanguageModel(Parallel, LlamaRMSNorm, grouped("expand"), GatedMlp),
    "vit": VisionTransformer,
    "convnext": ConvNeXt,
}
OTHERS: dict[str, Make] = {
    "post-norm": lambda: LanguageModel(PostNorm, layer_norm, Attention, Mlp, final=False),
    "tied": lambda: LanguageModel(PreNorm, rms_norm, Attention, GatedMlp, tied=True),
}


def build(variant: str = "layer norm") -> Any:
    """A network by its name."""
    return {**FOLDED, **OTHERS}[variant]()
