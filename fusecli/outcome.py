"""Plain frozen results that all layers exchange; the JSON report is these values and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

from fusecli.errors import ExitCode

SCHEMA_VERSION = 1


# What an artifact is for: inference, with its norms folded, or training that simulates quantization.
Mode = Literal["folded", "qat"]


class Judgement(str, Enum):
    """The three possible verdicts, for the whole model and for each group."""

    EQUIVALENT = "equivalent"
    DIFFERENT = "different"
    INCONCLUSIVE = "inconclusive"

    def __str__(self) -> str:
        return self.value


class Evidence(str, Enum):
    """How adjacency is known: the model was run, or the list was believed."""

    OBSERVED = "observed"
    CLAIMED = "claimed"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Refusal:
    """Why a group was not fused. A result, not an exception.

    code      one word from a closed list, e.g. "overflow", "parametrized", "bad-statistics"
    reason    the sentence for people
    evidence  what was seen: module paths, op names, channels, numbers
    remedy    what the user can do about it
    """

    group: tuple[str, ...]
    code: str
    reason: str
    rule: str | None = None
    evidence: tuple[str, ...] = ()
    remedy: str = ""


@dataclass(frozen=True)
class Unfused:
    """A norm layer that is left in the model, and why (code, evidence and remedy as for refusals).

    kind        the class, or "function NAME" where no module computes it
    """

    module: str
    kind: str
    code: str
    reason: str
    evidence: tuple[str, ...] = ()
    remedy: str = ""

    @property
    def functional(self) -> bool:
        return self.kind.startswith("function ")


@dataclass(frozen=True)
class GroupReport:
    """One group: what it was, what it became, and how sure we are.

    status         "equivalent" | "different" | "inconclusive" | "planned" (nothing was verified)
    float64_error  max|a-b| / max|a| between original and fused float64 twins
    drift          the stored model's error against float64; noise_floor: the original's own (same unit)
    weight_range_* max over min of the per-channel weight range: above about 100 an int8 hazard
    kept           members that stay where they are (an activation no container takes)
    """

    modules: tuple[str, ...]
    rule: str
    status: str
    evidence: Evidence
    kinds_before: tuple[str, ...] = ()
    kinds_after: tuple[str, ...] = ()
    float64_error: float | None = None
    drift: float | None = None
    noise_floor: float | None = None
    weight_range_before: float | None = None
    weight_range_after: float | None = None
    keys_removed: tuple[str, ...] = ()
    keys_renamed: tuple[tuple[str, str], ...] = ()
    keys_added: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class LedgerEntry:
    """Something that was lost or changed besides the fold itself, or somebody's code that was allowed.

    kind: "hook" | "requires-grad" | "tie" | "train-mode" | "assumed" | "statistics" | "input" | "adapter"
          | "bare-identity" | "sizes" | "consent" | "quantizer" | "calibration" | "comparison"; "input" is a
          file that is another one than was used before
    """

    kind: str
    where: str
    what: str


# Of a line that asks a tensor for its numbers: `.item()`, `bool(tensor)`, `.tolist()`.
ASKED = "forward looks at numbers here: what is shown holds for inputs that make it go the recorded way"


@dataclass(frozen=True)
class Verdict:
    """The judgement on the whole model, what it rests on and, if it failed, where.

    float64_error       max|a-b| / max|a| end to end, float64 twins; None: not run end to end
    tolerance           the line that float64_error is held against
    drift, noise_floor  the same ratio in the stored dtype, of the fused and of the original model
    smallest_tolerance  the smallest that the verdict is, or would be, `equivalent` with; None: none is
    first_different     the first group (in the order of the model's run) that differs
    checks              name of each check -> one sentence that says what it proved or missed
    check_results       name of each check -> how it ended, for the mark in front of the sentence
    ledger              what the runs have shown of the model besides: where forward asks for numbers or sizes
    """

    judgement: Judgement
    groups: tuple[GroupReport, ...] = ()
    float64_error: float | None = None
    tolerance: float = 1e-9
    drift: float | None = None
    noise_floor: float | None = None
    smallest_tolerance: float | None = None
    first_different: tuple[str, ...] | None = None
    end_to_end: bool = False
    samples: int = 0
    seed: int = 0
    checks: Mapping[str, str] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()
    check_results: Mapping[str, Judgement] = field(default_factory=dict)
    ledger: tuple[LedgerEntry, ...] = ()

    @property
    def equivalent(self) -> bool:
        return self.judgement is Judgement.EQUIVALENT

    def __str__(self) -> str:
        return str(self.judgement)


@dataclass(frozen=True)
class Totals:
    """Counts of one model or checkpoint: modules, parameters, bytes, norm layers, and the op calls that
    compute something in one recorded forward."""

    modules: int | None
    parameters: int
    bytes: int
    norms: int
    ops: int | None = None


@dataclass(frozen=True)
class FileFacts:
    """A file that took part: its path as the user gave it, format, size in bytes and sha256."""

    path: str
    format: str = ""
    bytes: int | None = None
    sha256: str | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class UnitReport:
    """One unit of an int8 model: ops that compute on quantized values and give one.

    name, kind    what its output is called, and its ops: 'conv2d+relu'
    sqnr, cosine  of its output against the float model's, in dB and between -1 and 1; None: not measured
    weight_range  largest over smallest per-channel weight range: above about 100 a hazard of int8
    """

    name: str
    kind: str
    modules: tuple[str, ...] = ()
    sqnr: float | None = None
    cosine: float | None = None
    weight_range: float | None = None


@dataclass(frozen=True)
class FloatReport:
    """An op that stays float, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class EqualizedReport:
    """Two layers in a row between which ranges were moved: the largest over the smallest channel range of the
    first one's rows and the second one's columns, before and after."""

    first: str
    second: str
    rows_before: float
    rows_after: float
    columns_before: float
    columns_after: float


@dataclass(frozen=True)
class ChannelReport:
    """A number of the channel of the output that fares worst, and which one that is."""

    value: float
    place: str


@dataclass(frozen=True)
class Quantization:
    """What became int8, and how like the float model it is.

    units         the worst first
    sqnr ... top1 of the whole model's output, float against int8 (int8.comparison)
    channel_sqnr, channel_cosine  of the channel of the output that fares worst
    constant      channels of the output that are one number in int8, and not in float
    accuracy      share of right labels of the float, the fused and the int8 model; empty without labels
    bytes         sizes of the float, the fused and the int8 model, as they are stored
    latency       seconds per call of each, on this machine, measured side by side
    asked         the thresholds that decide; empty: nobody has asked for any
    calibration   what the ranges come from
    exact         largest float64 error of equalisation; None: there was none
    """

    units: tuple[UnitReport, ...] = ()
    left: tuple[FloatReport, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    calibration: str = ""
    samples: int = 0
    sqnr: float | None = None
    cosine: float | None = None
    worst_cosine: float | None = None
    top1: float | None = None
    channel_sqnr: ChannelReport | None = None
    channel_cosine: ChannelReport | None = None
    constant: tuple[str, ...] = ()
    accuracy: Mapping[str, float] = field(default_factory=dict)
    bytes: Mapping[str, int] = field(default_factory=dict)
    latency: Mapping[str, float] = field(default_factory=dict)
    asked: Mapping[str, float] = field(default_factory=dict)
    equalized: tuple[EqualizedReport, ...] = ()
    exact: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Everything that one `fuse`, `verify` or `quantize` found: the same facts as the JSON report.

    status     "fused" | "partly fused" | "quantized" | "verified" | "planned" | "different" |
               "inconclusive" | "refused" | "nothing to fuse" | "error"
    recording  how the run was recorded that the groups were audited against; "" without one
    peak_memory  the bytes that the process had in memory at most; None: nobody knows
    model      the fused copy (Python API only; never rendered)
    next_step  the exact command that verifies again, or what to do about a failure
    """

    command: str
    status: str
    exit_code: ExitCode
    groups: tuple[GroupReport, ...] = ()
    refused: tuple[Refusal, ...] = ()
    unfused: tuple[Unfused, ...] = ()
    verification: Verdict | None = None
    ledger: tuple[LedgerEntry, ...] = ()
    input: FileFacts | None = None
    output: FileFacts | None = None
    spec: FileFacts | None = None
    totals_before: Totals | None = None
    totals_after: Totals | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    next_step: str = ""
    recording: str = ""
    peak_memory: int | None = None
    quantization: Quantization | None = None
    model: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Proposal:
    """What a run of a model offers to fuse.

    groups     lists of module names, in the order of the run: what `fuse` takes
    unfused    every norm that is left, and why
    text       both as the lines of a spec
    recording  how the run was recorded
    """

    groups: tuple[tuple[str, ...], ...]
    unfused: tuple[Unfused, ...]
    text: str
    recording: str
