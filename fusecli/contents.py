"""What `inspect` found in a checkpoint: plain frozen facts, the same on the terminal and in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from fusecli.outcome import FileFacts


class Role(str, Enum):
    """What a module seems to be, by the names and shapes of its tensors alone."""

    LAYER = "layer"  # a weight with two axes or more: linear, embedding, convolution, transposed convolution
    NORM = "norm"  # running statistics
    SCALE = "scale"  # one number per channel: a norm without statistics, a PReLU, a layer scale
    REPARAMETRIZED = "reparametrized"  # its weight is computed from other tensors: weight_norm, spectral_norm
    OTHER = "other"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class TensorFacts:
    """One tensor, by its name inside of its module."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModuleFacts:
    """The tensors that stand directly under one path; "" is the model itself."""

    path: str
    role: Role
    tensors: tuple[TensorFacts, ...]

    def shape(self, name: str) -> tuple[int, ...] | None:
        return next((tensor.shape for tensor in self.tensors if tensor.name == name), None)


@dataclass(frozen=True)
class DtypeFacts:
    """How many tensors have one dtype, and their bytes."""

    dtype: str
    tensors: int
    bytes: int


@dataclass(frozen=True)
class NormFacts:
    """A norm with running statistics.

    untrained  mean 0 and variance 1 in every channel
    flaws      what makes it unfit to fold: "running_var is negative in 3 channels"
    """

    path: str
    channels: int
    affine: bool
    untrained: bool
    flaws: tuple[str, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A layer and a norm that may follow it: a guess from names, order and shapes.

    transposed  True: the channels fit a transposed convolution only; None: they fit both; False: they do not
    """

    layer: str
    norm: str
    channels: int
    transposed: bool | None


@dataclass(frozen=True)
class ArtifactFacts:
    """What the manifest of a fusecli artifact says."""

    mode: str
    rules: Mapping[str, int]
    groups: tuple[tuple[str, ...], ...]
    input_sha256: str
    spec_sha256: str
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Contents:
    """Everything that can be said of a checkpoint without running anything.

    nesting       the key that its state dict stands under; None: at the top
    alphabetical  the keys are sorted, so their order says nothing of the model's
    others        entries of the state dict that are no tensors
    draft         the text of a spec that fuses the candidates; "" where there is nothing to fuse
    """

    file: FileFacts
    shards: int
    nesting: str | None
    prefixes: tuple[str, ...]
    alphabetical: bool
    modules: tuple[ModuleFacts, ...]
    dtypes: tuple[DtypeFacts, ...]
    norms: tuple[NormFacts, ...]
    ties: tuple[tuple[str, ...], ...] = ()
    others: tuple[str, ...] = ()
    artifact: ArtifactFacts | None = None
    candidates: tuple[Candidate, ...] = ()
    draft: str = ""
