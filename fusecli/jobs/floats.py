"""The float model that becomes int8, and its fold, which is proven first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from fusecli.artifact import artifact_at, load_into, manifest_of
from fusecli.checkpoint import Checkpoint, open_checkpoint
from fusecli.consent import Consent
from fusecli.errors import ExitCode, Problem, UsageError
from fusecli.jobs import facts, int8_facts
from fusecli.jobs.fuse import FuseRequest, fuse_file
from fusecli.jobs.proof import Tick
from fusecli.jobs.source import Source, source_of
from fusecli.jobs.trained import read_trained
from fusecli.outcome import LedgerEntry, Outcome
from fusecli.qat.qparams import SIGNED, UNSIGNED, QParams, integers_of
from fusecli.rewrite import MANIFEST_KEY
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


def floats_of(path: Path, spec: Spec, consent: Consent, tick: Tick, allow_pickle: bool, seed: int) -> Floats:
    """The float model and its fold, proven; raises Stopped where the fold does not succeed."""
    if not (spec.groups or spec.discover):
        spec = spec.model_copy(update={"discover": True})
    # A container would change the names of weights, and an exported graph has no use for it.
    spec = spec.model_copy(update={"qat": False, "no_rules": (*spec.no_rules, *_CONTAINERS)})
    checkpoint = open_checkpoint(path, allow_pickle=allow_pickle, consent=consent, **_nesting(path, spec))
    with checkpoint:
        manifest = manifest_of(checkpoint) if MANIFEST_KEY in checkpoint.metadata else None
        source = source_of(checkpoint, spec, consent)
        _require_code(source, spec)
        if manifest is not None and manifest.mode == "folded":
            return _folded(source, consent)
        with TemporaryDirectory(prefix="fusecli-") as folder:
            # Extra state may be more than safetensors can hold.
            fused = Path(folder) / ("fused.pt" if checkpoint.others else "fused.safetensors")
            fuse = FuseRequest(path, spec, fused, seed=seed, allow_pickle=allow_pickle)
            outcome = fuse_file(fuse, consent, tick)
            if outcome.exit_code not in (ExitCode.OK, ExitCode.NOTHING):
                raise Stopped(replace(outcome, command="quantize", output=None))
            read_trained(source, spec, manifest)
            original = source.original()
            size = facts.totals(facts.layout_of(source.checkpoint), None).bytes
            outcome = replace(outcome, command="quantize", output=None, problems=(), next_step="")
            if outcome.exit_code is ExitCode.NOTHING:  # and nothing was learned: that would be written
                outcome = replace(outcome, exit_code=ExitCode.OK)
                return Floats(original, original, {}, outcome, {"float": size, "fused": size})
            with open_checkpoint(fused) as artifact:
                assert source.build is not None
                model = load_into(source.build(), artifact, lambda: consent)
                learned, unplaced = _learned(artifact)
                outcome = replace(outcome, ledger=(*outcome.ledger, *unplaced))
                after = facts.totals(facts.layout_of(artifact), None).bytes
            return Floats(original, model.eval(), learned, outcome, {"float": size, "fused": after})


def _nesting(path: Path, spec: Spec) -> dict[str, Any]:
    """How the spec opens the checkpoint; an artifact has no nesting and no prefix."""
    if int8_facts.facts_of(path) is not None:
        raise UsageError(Problem("is int8 already", str(path), "give the float checkpoint"))
    if artifact_at(path) is not None:
        return {}
    return {"key": spec.checkpoint.key, "strip_prefix": spec.checkpoint.strip_prefix}


def _require_code(source: Source, spec: Spec) -> None:
    if source.build is None:
        fix = "give --model and --input, or model and inputs in the spec"
        raise UsageError(Problem("int8 needs the model's code, which is exported", spec.where(()), fix))


def _folded(source: Source, consent: Consent) -> Floats:
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
    outcome = replace(outcome, ledger=unplaced)
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
