"""A checkpoint that was trained with simulated quantization, read as the float model that it is.

The norms inside its layers get the names that the model has for them; what quantizes weights and outputs is
kept beside the model, as scales and zero points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fusecli.checkpoint.qat_layout import QatLayout, qat_layout
from fusecli.engine import discover
from fusecli.errors import Problem, UsageError
from fusecli.graph.kinds import is_norm
from fusecli.graph.record import Run
from fusecli.rewrite import Container, Manifest, ModuleTree
from fusecli.source.learned_scales import StoredScale, Trained
from fusecli.source.samples import samples_of
from fusecli.source.source import Source
from fusecli.source.stand_ins import module_names
from fusecli.spec import Spec
from fusecli.spec.wildcards import bind_groups

# What keeps the names that the checkpoint has: no container, and no layer but the one before a norm.
_RULES = frozenset({"conv_bn", "conv_transpose_bn", "linear_bn", "bake"})


def read_trained(source: Source, spec: Spec, manifest: Manifest | None = None) -> Source:
    """The source of the float model that the checkpoint is, with `trained` set, where it has been trained so;
    else `source` as it is.

    manifest   that of an artifact which was fused to be trained
    """
    # The class of a whole module is the one that was trained.
    floats = source if spec.model is not None else replace(source, build=None)
    if manifest is not None:
        layout, norms = _of_manifest(manifest, floats)
    else:
        found = _layout(floats, spec)
        if found is None:
            return source
        layout, norms = found, _norms(floats, spec, found)
    _require_no_adapter(spec)
    hints: dict[str, Mapping[str, Any]] = {unit: _hints(floats, unit) for unit in norms}
    if manifest is not None:
        hints |= {group.modules[0]: group.hints for group in manifest.groups}
    return _read_as_float(floats, layout, norms, hints)


def read_as(source: Source, spec: Spec, norms: Mapping[str, str], plain: Collection[str]) -> Source:
    """`read_trained` with what an artifact's manifest says of the norms; `plain` are the artifact's keys."""
    floats = source if spec.model is not None else replace(source, build=None)
    layout = _recognised(floats, lambda path: f"{path}.weight" in plain)
    if layout is None:
        what = "is not the checkpoint of quantization-aware training that the artifact was made from"
        raise UsageError(Problem(what, str(source.checkpoint.path), "give the original first"))
    known = {layer: norms[layer] for layer in layout.units if layer in norms}
    return _read_as_float(floats, layout, known, {})


def _require_no_adapter(spec: Spec) -> None:
    """Raises UsageError: an adapter changes the weights that scales were learned for."""
    if spec.adapter is not None:
        what = "an adapter cannot be added to a checkpoint that was trained with simulated quantization"
        fix = "add it to the float checkpoint, before that training"
        raise UsageError(Problem(what, spec.where(("adapter",)), fix))


def _read_as_float(
    source: Source, layout: QatLayout, norms: Mapping[str, str], hints: Mapping[str, Mapping[str, Any]]
) -> Source:
    checkpoint, stored = source.checkpoint, source.checkpoint.tensors
    renamed = {key: _named(name, norms) for key, name in layout.names.items()}
    _require_distinct(renamed, str(checkpoint.path))
    tensors = {new: replace(stored[key], name=new) for key, new in renamed.items()}
    scales = {
        what: StoredScale(
            stored[q.scale], stored[q.zero_point], (stored[q.seen[0]], stored[q.seen[1]]) if q.seen else None
        )
        for what, q in layout.quantizers.items()
    }
    notice = f"trained with simulated quantization ({layout.kind}): read as float, {len(scales)} scales found"
    ties = [tuple(renamed[key] for key in tie if key in renamed) for tie in checkpoint.ties]
    floats = replace(
        checkpoint,
        tensors=tensors,
        ties=tuple(tie for tie in ties if len(tie) > 1),
        notices=(*checkpoint.notices, notice),
        module=None,
    )
    folded = frozenset(what for what, quantizer in layout.quantizers.items() if quantizer.folded)
    trained = Trained(layout.kind, norms, scales, folded, hints)
    allowed = source.vocabulary.rules
    rules = _RULES if allowed is None else _RULES & allowed
    vocabulary = replace(source.vocabulary, rules=rules)
    return replace(source, checkpoint=floats, trained=trained, vocabulary=vocabulary)


def _require_distinct(renamed: Mapping[str, str], where: str) -> None:
    """Raises UsageError where a norm inside a layer would get the name of another module."""
    owners: dict[str, str] = {}
    for key, name in renamed.items():
        if (other := owners.setdefault(name, key)) != key:
            what = f"{other} and {key} would both be {name}: that name belongs to one of them only"
            raise UsageError(Problem(what, where, "name the norm inside each layer as the model does"))


def _named(name: str, norms: Mapping[str, str]) -> str:
    """The plain name of a tensor, that of a norm inside a layer below the norm's own."""
    path, _, local = name.rpartition(".")
    layer = path.removesuffix(".bn")
    return f"{norms[layer]}.{local}" if path != layer and layer in norms else name


def _recognised(source: Source, contains: Callable[[str], bool]) -> QatLayout | None:
    shapes = {name: tensor.shape for name, tensor in source.checkpoint.tensors.items()}
    where = str(source.checkpoint.path)
    try:
        layout = qat_layout(shapes, contains)
    except ValueError as error:
        raise UsageError(Problem(str(error), where)) from error
    if layout is not None and "" in layout.units:
        what = "the whole file is one layer with a norm inside, and neither has a name"
        raise UsageError(Problem(what, where, "save it as part of a model: nn.Sequential(layer)"))
    return layout


def may_be_trained(source: Source) -> bool:
    """Whether the names could be those of containers: those of a Sequential look the same."""
    return _recognised(source, lambda path: bool(path)) is not None


def _layout(source: Source, spec: Spec) -> QatLayout | None:
    if source.build is not None:
        expected = set(source.names)
        layout = _recognised(source, lambda path: f"{path}.weight" in expected)
        return layout if layout is None or not _is_its_own(layout, expected, source, spec) else None
    firsts = (re.escape(group.modules[0]).replace(r"\*", "[^.]*") for group in spec.groups)
    listed = re.compile("|".join(firsts) or "(?!)")
    return _recognised(source, lambda path: listed.fullmatch(path) is not None)


def _is_its_own(layout: QatLayout, expected: Collection[str], source: Source, spec: Spec) -> bool:
    """Whether the model's class has all that the file has, observers too; raises UsageError where it is the
    prepared model itself, whose norms are out of reach."""
    own = not source.checkpoint.tensors.keys() - expected
    if own and layout.kind == "prepared" and layout.units:
        what = f"the factory builds the model as it was prepared: {layout.units[0]} has a norm inside"
        fix = "name a factory that builds the float model, as it was before fuse_modules_qat"
        raise UsageError(Problem(what, spec.where(("model",)), fix))
    return own and layout.kind == "prepared"


def _of_manifest(manifest: Manifest, source: Source) -> tuple[QatLayout, dict[str, str]]:
    """The layout of an artifact that fusecli made for training: its edits say which container holds what."""
    containers = {edit.path: edit.members for edit in manifest.edits if isinstance(edit, Container)}
    if len(containers) < len(manifest.edits):
        what = "a custom fuser took part in it, and only that knows what its tensors are"
        raise UsageError(Problem(what, str(source.checkpoint.path), "fold the original checkpoint"))
    plain: dict[str, str] = {}
    norms: dict[str, str] = {}
    for key in source.checkpoint.tensors:
        path = next((path for path in containers if key.startswith(f"{path}.")), "")
        if not path:
            plain[key] = key
            continue
        number, _, local = key[len(path) + 1 :].partition(".")
        members = dict(enumerate(containers[path]))
        if not local or not number.isdecimal() or int(number) not in members:
            what = f"its manifest does not say which module {key} belongs to"
            raise UsageError(Problem(what, str(source.checkpoint.path), "fuse the original again"))
        member = members[int(number)]
        plain[key] = f"{member}.{local}"
        if local == "running_mean" and member != path:
            norms[path] = member
    return QatLayout("fused", plain, tuple(norms), {}, ()), norms


def _norms(source: Source, spec: Spec, layout: QatLayout) -> dict[str, str]:
    """For each layer with a norm inside the name of that norm; raises UsageError where nothing says it."""
    units = layout.units
    if source.build is None:
        return _claimed(source, spec, units)
    model = source.blank().eval()
    tree = ModuleTree(model)
    found: dict[str, str] = {}
    for group in bind_groups(spec, [path for path in tree.modules if path], shared_last=True):
        norm = next((path for path in group.modules[1:] if is_norm(tree[path])), None)
        if norm is not None and group.modules[0] in units:
            found[group.modules[0]] = norm
    missing = [unit for unit in units if unit not in found]
    if missing and spec.inputs:
        stored = {name: source.checkpoint.tensors[key].dtype for key, name in layout.names.items()}
        dtype = stored.get(f"{missing[0]}.weight", torch.get_default_dtype())
        build = source.build
        run = Run(model.to(dtype), samples_of(spec, spec.verify.seed, 1)[0], lambda: build().to(dtype))
        for offered in discover(tree, run, replace(source.vocabulary, rules=_RULES)).groups:
            if offered.modules[0] in missing:
                found[offered.modules[0]] = offered.modules[1]
    if missing := [unit for unit in units if unit not in found]:
        what = f"{missing[0]} holds a norm, and nothing says which one of the model it is"
        fix = f"list the layer and its norm in groups: [{missing[0]}, ...]"
        fix += "" if spec.inputs else ", or give inputs to run the model on"
        raise UsageError(Problem(what, str(source.checkpoint.path), fix))
    return found


def _claimed(source: Source, spec: Spec, units: Sequence[str]) -> dict[str, str]:
    """Without the model's code: the names in the spec's groups, else those that torch.ao gives them."""
    known = [*dict.fromkeys((*units, *module_names(source.checkpoint)))]
    bound = bind_groups(spec, known, optional_from=1) if spec.groups else []
    listed = {group.modules[0]: group.modules[1] for group in bound if len(group.modules) > 1}
    return {unit: listed.get(unit, f"{unit}.bn") for unit in units}


def _hints(source: Source, unit: str) -> dict[str, Any]:
    """What a whole module that was saved tells of a layer and the norm inside."""
    if source.checkpoint.module is None:
        return {}
    held = dict(source.checkpoint.module.named_modules())
    norm = next((held[name] for name in (f"{unit}.bn", f"{unit}.1") if name in held), None)
    return {"eps": norm.eps} if norm is not None and hasattr(norm, "eps") else {}


def require_folding(spec: Spec, source: Source) -> None:
    """Raises UsageError where what was trained already is to be fused for training."""
    if spec.qat:
        what = "it has been fused for training already"
        fix = "to fold it, give --no-qat, or a spec without qat: true"
        raise UsageError(Problem(what, str(source.checkpoint.path), fix))
