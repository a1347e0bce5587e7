"""The float model that becomes int8, and its fold, which is proven first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor, nn

from fusecli.artifact import load_into, manifest_of
from fusecli.checkpoint import Checkpoint, open_checkpoint
from fusecli.commands import int8_facts
from fusecli.commands.fuse import FuseRequest, fuse_source, opened
from fusecli.consent import Consent
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.outcome import LedgerEntry, Outcome
from fusecli.pipeline import facts
from fusecli.pipeline.fold import Progress
from fusecli.qat.qparams import SIGNED, UNSIGNED, QParams, integers_of
from fusecli.rewrite import MANIFEST_KEY
from fusecli.source.resolve import resolve, source_of
from fusecli.source.samples import as_computed
from fusecli.source.source import Source
from fusecli.spec import Spec

Learned = Mapping[str, tuple[Tensor, Tensor]]
_CONTAINERS = ("conv_bn_relu", "linear_bn_relu")


@dataclass(frozen=True)
class Floats:
    """The float model and its fold, what was learned for it, and how the fold went (None: it was one)."""

    original: nn.Module
    fused: nn.Module
    learned: Learned
    outcome: Outcome
    bytes: Mapping[str, int]


class Stopped(Exception):
    """The fold did not succeed; carries its outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.status)
        self.outcome = outcome


@contextmanager
def opened_floats(path: Path, spec: Spec, allow_pickle: bool, consent: Consent) -> Iterator[Checkpoint]:
    """The float checkpoint, read once for all that is done with it; raises UsageError for what is int8."""
    int8 = UsageError(Problem("is int8 already", str(path), "give the float checkpoint"))
    if int8_facts.is_archive(path) and int8_facts.facts_inside(path) is not None:
        raise int8
    with opened(path, spec, allow_pickle, consent) as checkpoint:
        if MANIFEST_KEY in checkpoint.metadata and int8_facts.facts_in(checkpoint) is not None:
            raise int8
        yield checkpoint


def floats_of(
    checkpoint: Checkpoint, spec: Spec, consent: Consent, progress: Progress, allow_pickle: bool, seed: int
) -> Floats:
    """The float model and its fold, proven; raises Stopped where the fold does not succeed."""
    if not (spec.groups or spec.discover):
        spec = spec.model_copy(update={"discover": True})
    # A container would change the names of weights, and an exported graph has no use for it.
    spec = spec.model_copy(update={"qat": False, "no_rules": (*spec.no_rules, *_CONTAINERS)})
    manifest = manifest_of(checkpoint) if MANIFEST_KEY in checkpoint.metadata else None
    if manifest is not None and manifest.mode == "folded":
        source = source_of(checkpoint, spec, consent)
        _require_code(source, spec)
        return _folded(source, consent, as_computed(spec, checkpoint)[1])
    source, spec = resolve(checkpoint, spec, consent, manifest)
    _require_code(source, spec)
    with TemporaryDirectory(prefix="fusecli-") as folder:
        # Extra state may be more than safetensors can hold.
        target = Path(folder) / ("fused.pt" if checkpoint.others else "fused.safetensors")
        request = FuseRequest(checkpoint.path, spec, target, seed=seed, allow_pickle=allow_pickle)
        outcome = fuse_source(request, source, consent, progress)
        if outcome.exit_code not in (ExitCode.OK, ExitCode.NOTHING):
            raise Stopped(replace(outcome, command="quantize", output=None))
        return _made(source, outcome, target, consent)


def _made(source: Source, outcome: Outcome, target: Path, consent: Consent) -> Floats:
    """The float model and the fold that was written to `target`, if there was one."""
    original = source.original()
    size = facts.totals(facts.layout_of(source.checkpoint), None).bytes
    outcome = replace(outcome, command="quantize", output=None, problems=(), next_step="")
    if outcome.exit_code is ExitCode.NOTHING:  # and nothing was learned: that would be written
        outcome = replace(outcome, exit_code=ExitCode.OK)
        return Floats(original, original, {}, outcome, {"float": size, "fused": size})
    with open_checkpoint(target) as artifact:
        assert source.build is not None
        model = load_into(source.build(), artifact, lambda: consent)
        learned, unplaced = _learned(artifact)
        after = facts.totals(facts.layout_of(artifact), None).bytes
    outcome = replace(outcome, ledger=(*outcome.ledger, *unplaced))
    return Floats(original, model.eval(), learned, outcome, {"float": size, "fused": after})


def _require_code(source: Source, spec: Spec) -> None:
    if source.build is None:
        fix = "give --model and --input, or model and inputs in the spec"
        raise UsageError(Problem("int8 needs the model's code, which is exported", spec.where(()), fix))


def _folded(source: Source, consent: Consent, told: Sequence[LedgerEntry]) -> Floats:
    """An artifact that was folded before: its own float model is what int8 is held against."""
    assert source.build is not None
    checkpoint = source.checkpoint
    model = load_into(source.build(), checkpoint, lambda: consent).eval()
    size = facts.totals(facts.layout_of(checkpoint), None).bytes
    outcome = Outcome(
        "quantize",
        "nothing to fuse",
        ExitCode.OK,
        input=facts.input_facts(checkpoint),
        environment=facts.environment(),
    )
    learned, unplaced = _learned(checkpoint)
    outcome = replace(outcome, ledger=(*told, *unplaced))
    return Floats(model, model, learned, outcome, {"float": size, "fused": size})


def _learned(artifact: Checkpoint) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[LedgerEntry, ...]]:
    """Scales and zero points that quantization-aware training has learned, by what they quantize, for the
    integers that are stored here: signed ones for weights, unsigned ones for activations. And those that
    belong to nothing that has a name."""
    trained = manifest_of(artifact).trained
    records = trained.quantizers if trained is not None else ()
    found, unplaced = {}, []
    for record in records:
        if not record.of.endswith((".weight", ".output")):
            unplaced.append(record.of)
            continue
        scale, zero_point = (artifact.tensors[name].load().clone() for name in record.tensors)
        weight = record.of.endswith(".weight")
        integers = record.integers or integers_of(scale, zero_point, None, None, weight=weight)
        stored = QParams(scale, zero_point, integers).within(SIGNED if weight else UNSIGNED)
        found[record.of] = stored.scale, stored.zero_point
    return found, tuple(_numbered(unplaced))


def _numbered(names: Sequence[str]) -> Iterator[LedgerEntry]:
    """What the report says of the observers of prepare_qat_fx."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        what = (
            "the scale is not used: prepare_qat_fx numbers its observers, and no tensor says which value each"
        )
        yield LedgerEntry("quantizer", f"{names[0]}{more}", f"{what} belongs to; calibration gives one")
