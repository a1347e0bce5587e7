"""The options that commands share; the help text of each stands here and nowhere else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from fusecli.errors import Problem, UsageError

_RUN, _CODE, _PROOF, _REPORT = "Model", "Trust", "Verification", "Report"

Checkpoint = Annotated[Path, typer.Argument(help="The checkpoint to read; it is never changed.")]
AllowCode = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer on Python 3.10 reads the annotation at run time)
    typer.Option(
        "--allow-code",
        metavar="PKG|FILE.py",
        help="Code that the spec may name and fusecli may run. Repeatable.",
        rich_help_panel=_CODE,
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Load pickles that run code while they load, such as whole modules. Only for files you trust.",
        rich_help_panel=_CODE,
    ),
]
SpecFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--spec", "-s", help="The YAML spec: which modules to fuse, and how to run it."),
]
Model = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--model",
        metavar="PKG:FACTORY|FILE.py:NET(...)",
        help="The code that builds the model, with its keyword arguments. To type it is to trust it.",
        rich_help_panel=_RUN,
    ),
]
Inputs = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--input",
        metavar="SHAPE|FILE:KEY",
        help="An argument of forward: 1x3x224x224, 2x16:int64:0..1000, mask=2x16:bool, or a tensor of a "
        "safetensors file, x.safetensors:images. A dict: image=1x3x8x8,mask=1x8x8. Repeatable.",
        rich_help_panel=_RUN,
    ),
]
Target = Annotated[
    Optional[Literal["inference", "quant"]],  # noqa: UP045
    typer.Option(
        help="What is discovered: inference folds norms; quant puts a ReLU into a container too.",
        rich_help_panel=_RUN,
    ),
]
Shared = Annotated[
    Optional[Literal["refuse", "clone"]],  # noqa: UP045
    typer.Option(
        help="What has several names: refuse to fold it, or clone it for each name that can be folded.",
        rich_help_panel=_RUN,
    ),
]
Rules = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--rules",
        metavar="NAME,NAME",
        help="Use these rules only. 'fusecli rules' lists them.",
        rich_help_panel=_RUN,
    ),
]
NoRules = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--no-rules", metavar="NAME,NAME", help="Do not use these rules.", rich_help_panel=_RUN),
]
Restructure = Annotated[
    bool,
    typer.Option(
        "--allow-restructure",
        help="A layer may become one of another class where only that is exact: a convolution that pads with "
        "a value for each channel.",
        rich_help_panel=_RUN,
    ),
]
RemoveIdle = Annotated[
    bool,
    typer.Option(
        "--remove-idle",
        help="Make identities of modules that do nothing at inference, such as Dropout; other code may use "
        "them.",
        rich_help_panel=_RUN,
    ),
]
Qat = Annotated[
    Optional[bool],  # noqa: UP045
    typer.Option(
        "--qat/--no-qat",
        help="Fuse for training with simulated quantization: layers, norms and ReLUs go into containers, and "
        "nothing is folded.",
        rich_help_panel=_RUN,
    ),
]
Eps = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(
        "--assume-eps",
        help="The eps of norms that no module can be asked for; a state dict does not hold it.",
        min=0,
        rich_help_panel=_RUN,
    ),
]
Bake = Annotated[
    bool,
    typer.Option(
        "--bake",
        help="Make plain weights of those that weight_norm, spectral_norm, pruning masks or parametrizations "
        "compute, and fold them like any other.",
        rich_help_panel=_RUN,
    ),
]
Threshold = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--threshold",
        metavar="NAME=X,...",
        help="What int8 has to reach: sqnr=20 (dB), cosine=0.98, top1=0.99, accuracy_drop=1 (points).",
        rich_help_panel=_PROOF,
    ),
]
Seed = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="Seed of the random inputs, instead of the spec's.", min=0, max=2**63 - 1, rich_help_panel=_PROOF
    ),
]
Samples = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Number of random inputs, instead of the spec's.", min=1, rich_help_panel=_PROOF),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Count as inconclusive what was only claimed or assumed, lost hooks and untrained statistics.",
        rich_help_panel=_PROOF,
    ),
]
Memory = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="What the proof may keep of float64 weights from one run to the next: 512MB, 4GB; default: "
        "128MB. More is faster for a large model.",
        rich_help_panel=_PROOF,
    ),
]
SamePath = Annotated[
    bool,
    typer.Option(
        "--assume-same-path",
        help="Believe that every input goes through the modules that ran, where others stand beside them to "
        "choose from.",
        rich_help_panel=_PROOF,
    ),
]
Report = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--report",
        metavar="json=PATH|md=PATH",
        help="Also write the report there, on failure too; PATH '-' is stdout. Repeatable.",
        rich_help_panel=_REPORT,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=_REPORT)]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show Python tracebacks with errors.", rich_help_panel=_REPORT)
]


def trusted(allow_code: list[str] | None, model: str | None) -> list[str]:
    """Whose code may run: what was allowed, and what --model names."""
    source = model.partition("(")[0].rpartition(":")[0] if model else ""
    typed = [source if source.endswith(".py") else source.partition(".")[0]] if source else []
    return [*(allow_code or []), *typed]


def lines(text: str) -> dict[str, float]:
    """sqnr=20,cosine=0.98 as a mapping; the spec's reader knows the names. Raises UsageError."""
    found: dict[str, float] = {}
    for word in text.split(","):
        name, _, number = (part.strip() for part in word.partition("="))
        if name in found:
            raise UsageError(Problem(f"{name} is given twice", "--threshold", "give it once"))
        try:
            found[name] = float(number)
        except ValueError:
            fix = "write sqnr=20, cosine=0.98, top1=0.99 or accuracy_drop=1, with commas between"
            raise UsageError(Problem(f"'{word}' is no threshold", "--threshold", fix)) from None
    return found


def typed_words(model: str | None, inputs: list[str] | None, *, same_path: bool = False) -> list[str]:
    """The options that name the model again, and what is believed of it, for the next command."""
    words = ["--model", model] if model else []
    words += [word for text in inputs or () for word in ("--input", text)]
    return [*words, *(["--assume-same-path"] if same_path else [])]
