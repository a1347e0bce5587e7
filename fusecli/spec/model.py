"""The spec as frozen values: one class for each mapping that a spec file can hold."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from fusecli.outcome import Mode
from fusecli.spec import nodes
from fusecli.spec.adapter import Adapter
from fusecli.spec.code import ExtraMapping, Model
from fusecli.spec.groups import GroupSpec
from fusecli.spec.inputs import InputEntry, refuse_misplaced_names
from fusecli.spec.part import Count, Eps, Flag, Listed, Maybe, Part, Pattern, Section, Text
from fusecli.spec.quantize import Quantize
from fusecli.spec.scalars import one_of, problem, read_int

VERSIONS = (1,)


class Checkpoint(Part):
    """Where the tensors are inside a training file, and prefixes of their names that wrappers left behind."""

    key: Maybe[Text] = None
    strip_prefix: Listed[Text] = ()


class Assume(Part):
    """What to believe where no module can be asked.

    transposed  how to read a weight that a convolution and a transposed convolution could both have
    """

    eps: Maybe[Eps] = None
    transposed: Maybe[Flag] = None


def _torch_takes_it(seed: int) -> int:
    if not 0 <= seed < 1 << 63:
        raise problem(f"a seed is at least 0 and below 2**63, found {seed}")
    return seed


def _bytes(text: Any) -> int:
    try:
        size = int(_SIZE.validate_python(text))
    except ValidationError:
        size = -1
    if isinstance(text, bool) or size < 0:
        raise problem(f"a size is written as 512MB or 4GB, found '{text}'")
    return size


_SIZE = TypeAdapter(ByteSize)
_SIZES = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}


class Verify(Part):
    """How many random samples the outputs are compared on, and the seed they are drawn with.

    assume_same_path  believe that every input goes through the modules that ran, where others stand beside
    memory            what the proof may keep of float64 weights from one run to the next, in bytes
    """

    seed: Annotated[int, BeforeValidator(read_int), AfterValidator(_torch_takes_it)] = 0
    samples: Count = 4
    assume_same_path: Flag = False
    memory: Maybe[Annotated[int, BeforeValidator(_bytes), WithJsonSchema(_SIZES)]] = None


class Output(Part):
    """The file that is written. Without a format the name of the output decides."""

    format: Maybe[
        Annotated[Literal["safetensors", "pt"], BeforeValidator(one_of("format", ("safetensors", "pt")))]
    ] = None
    dtype: Annotated[Literal["keep"], BeforeValidator(one_of("dtype", ("keep",)))] = "keep"


@dataclass(frozen=True)
class Origin:
    """Where a spec came from. Two specs that say the same are equal wherever they stand."""

    source: Path | None = field(default=None, compare=False)
    sha256: str | None = field(default=None, compare=False)
    root: nodes.Node | None = field(default=None, compare=False, repr=False)


Target = Literal["inference", "quant"]
Shared = Literal["refuse", "clone"]


class Spec(Part):
    """Everything a spec file says, with defaults filled in.

    qat       put layers and norms into containers that are trained with simulated quantization
    discover  also fuse what the dataflow offers
    target    what discovery is for: "inference" folds norms, "quant" puts a ReLU into a container too
    bake      layers whose weight is computed (weight_norm, a pruning mask) are made plain, and then folded
    adapter   a LoRA adapter that is added to the checkpoint's weights
    shared    a weight or module with several names: refuse to fold it, or clone it for each name
    rules     the rules that may be used; empty: all but `no_rules`
    remove_idle        what does nothing at inference becomes an identity
    allow_restructure  a layer may become one of another class, where only that is exact
    """

    version: Annotated[int, BeforeValidator(read_int)] = 1
    checkpoint: Section[Checkpoint] = Checkpoint()
    model: Maybe[Section[Model]] = None
    inputs: Listed[InputEntry] = ()
    qat: Flag = False
    bake: Flag = False
    adapter: Maybe[Section[Adapter]] = None
    groups: Listed[GroupSpec] = ()
    assume: Section[Assume] = Assume()
    discover: Flag = False
    target: Annotated[Target, BeforeValidator(one_of("target", get_args(Target)))] = "inference"
    shared: Annotated[Shared, BeforeValidator(one_of("shared", get_args(Shared)))] = "refuse"
    rules: Listed[Text] = ()
    no_rules: Listed[Text] = ()
    allow_restructure: Flag = False
    remove_idle: Flag = False
    exclude: Listed[Pattern] = ()
    extra_mappings: Listed[Section[ExtraMapping]] = ()
    verify: Section[Verify] = Verify()
    quantize: Section[Quantize] = Quantize()
    output: Section[Output] = Output()

    _origin: Origin = PrivateAttr(default_factory=Origin)

    @property
    def source(self) -> Path | None:
        """The file this spec was read from."""
        return self._origin.source

    @property
    def folder(self) -> Path:
        """Where its relative paths start: its own folder."""
        return self.source.parent if self.source else Path.cwd()

    @property
    def sha256(self) -> str | None:
        """The sha256 of that file's bytes, in hexadecimal."""
        return self._origin.sha256

    def where(self, path: nodes.Path) -> str:
        """The place of `path`, or of the nearest thing around it: ("groups", 3) -> "fuse.yaml:14:3"."""
        root = self._origin.root
        return str(nodes.find(root, path).headed) if root else nodes.written(path, "spec")

    @field_validator("version")
    @classmethod
    def _known_version(cls, version: int) -> int:
        if version not in VERSIONS:
            known = ", ".join(map(str, VERSIONS))
            raise problem(
                f"version {version} is unknown to this fusecli, which knows {known}", "write version: 1"
            )
        return version

    @property
    def mode(self) -> Mode:
        """What is made: a folded model, or one that is trained with simulated quantization."""
        return "qat" if self.qat else "folded"

    @model_validator(mode="after")
    def _qat_folds_nothing(self) -> Self:
        folding = ("bake", "adapter", "remove_idle", "allow_restructure")
        stray = [name for name in folding if self.qat and getattr(self, name)]
        if self.qat and self.shared == "clone":
            stray.append("shared: clone")
        if stray:
            what = f"{' and '.join(stray)} cannot go with qat: true, which trains and folds nothing"
            raise problem(what, "fold for inference once it is trained, with a spec without qat")
        return self

    @field_validator("inputs")
    @classmethod
    def _positional_first(cls, inputs: tuple[InputEntry, ...]) -> tuple[InputEntry, ...]:
        return refuse_misplaced_names(inputs)
