"""Fused artifacts: reading the manifest, and loading one into a freshly built model as any user would."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fusecli import rewrite
from fusecli.checkpoint import Checkpoint, open_checkpoint
from fusecli.consent import Consent, load_object
from fusecli.errors import FusecliError, Problem, UsageError
from fusecli.nn.shallow import shallow_copy
from fusecli.outcome import Mode
from fusecli.rewrite import Edit, Manifest, ModuleTree, Opaque, apply_edits

_MOST_NAMES = 3


def load_fused(
    model: nn.Module, path: str | Path, *, mode: Mode | None = None, allow_code: Iterable[str] = ()
) -> nn.Module:
    """`model` with the edits and the tensors of the artifact at `path`: in eval mode, or in train mode if it
    was fused for training (`qat: true`).

    `model` is freshly built by the class that the original checkpoint belongs to; it is changed in place and
    returned. Loading is strict. Parameters take the stored dtype and stay on their device; meta ones come to
    the CPU. With `mode`, "folded" or "qat", an artifact of the other kind is refused.
    An artifact made by a custom fuser needs that code, and `allow_code` naming its package or file.
    Raises UsageError where model and artifact do not belong together, UnsafeError for a file that is no
    artifact or names code that nobody allowed.
    """
    with open_checkpoint(path) as checkpoint:
        if mode is not None:
            require_mode(manifest_of(checkpoint), mode, str(checkpoint.path))
        return load_into(model, checkpoint, lambda: Consent.gather(allow_code))


def require_mode(manifest: Manifest, mode: Mode, where: str) -> None:
    """Raises UsageError for an artifact that was made for the other purpose."""
    if manifest.mode == mode:
        return
    said = {
        "qat": ("is folded, its norms are gone: it cannot be trained as QAT is", "with qat: true"),
        "folded": ("is to be trained (qat), its norms are not folded", "without qat, once it is trained"),
    }
    what, how = said[mode]
    raise UsageError(Problem(f"the artifact {what}", where, f"fuse the checkpoint {how}"))


def load_into(
    model: nn.Module, artifact: Checkpoint, consent: Callable[[], Consent], folder: Path | None = None
) -> nn.Module:
    """`load_fused` on an open artifact; the fusers of opaque edits are files relative to `folder`."""
    manifest = manifest_of(artifact)
    edits = manifest.edits
    where = str(artifact.path)
    if any(isinstance(edit, Opaque) for edit in edits):
        model.eval()  # as the members were when fuse called the fuser
        edits = tuple(_with_fuser(edit, model, consent(), folder, manifest.mode) for edit in edits)
    replay(model, edits, where)
    state = {name: value for name, value in loaded(artifact).items() if name not in manifest.learned}
    load_strictly(model, state, where)
    custom = any(isinstance(edit, Opaque) for edit in edits)
    ModuleTree(model).note_groups({group.planned: group.rule for group in manifest.groups}, custom=custom)
    model.train(manifest.mode == "qat")
    return model


def manifest_of(checkpoint: Checkpoint) -> Manifest:
    """The manifest inside an artifact; raises UsageError for a checkpoint that fusecli did not write."""
    text = checkpoint.metadata.get(rewrite.MANIFEST_KEY)
    if text is None:
        fix = "load_state_dict loads a plain checkpoint; 'fusecli fuse' makes an artifact of it"
        raise UsageError(Problem("there is no fusecli manifest in this file", str(checkpoint.path), fix))
    return Manifest.from_json(text, str(checkpoint.path))


def artifact_at(path: Path) -> Checkpoint | None:
    """The checkpoint at `path` if fusecli wrote it."""
    try:
        checkpoint = open_checkpoint(path)
    except FusecliError:
        return None
    return checkpoint if rewrite.MANIFEST_KEY in checkpoint.metadata else None


def loaded(checkpoint: Checkpoint) -> dict[str, Any]:
    """Every entry of a checkpoint's state dict, as memory of our own: the file may go away."""
    return {name: stored.load().clone() for name, stored in checkpoint.tensors.items()} | dict(
        checkpoint.others
    )


def replay(model: nn.Module, edits: Iterable[Edit], where: str) -> None:
    """Does a manifest's edits; raises UsageError where the model has not got the modules they speak of."""
    try:
        apply_edits(ModuleTree(model), edits)
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        IndexError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise UsageError(
            Problem(
                f"its edits do not fit {type(model).__name__}: {error}",
                where,
                "build the model with the class and arguments that the original checkpoint was trained with",
            )
        ) from error


def load_strictly(model: nn.Module, state: Mapping[str, Any], where: str) -> None:
    """Loads every tensor in its stored dtype; parameters that were one object stay one.

    Raises UsageError naming missing and unexpected keys and shapes that differ.
    """
    expected = model.state_dict()
    # A counter of training batches: old checkpoints have none, and inference does not read it.
    needed = {key for key in expected if not key.endswith("num_batches_tracked")}
    problems = _differences(needed - state.keys(), state.keys() - expected.keys(), expected.keys(), where)
    problems += _shapes(state, expected, where)
    if problems:
        raise UsageError(*problems)
    ties = ties_of(model)
    moved = {
        key: _at_home(value, expected[key]) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }
    try:
        missing = [
            key
            for key in model.load_state_dict(moved, strict=False, assign=True).missing_keys
            if key in needed
        ]
    except RuntimeError as error:
        raise UsageError(Problem(str(error).partition("\n\t")[2] or str(error), where)) from error
    assert not missing
    tie(model, ties)


def _at_home(tensor: Tensor, place: Any) -> Tensor:
    return tensor if not isinstance(place, Tensor) or place.is_meta else tensor.to(place.device)


def _differences(
    missing: Collection[str], unexpected: Collection[str], known: Collection[str], where: str
) -> list[Problem]:
    fix = "check model.factory and kwargs, and checkpoint.key if the file holds several models"
    problems = []
    if missing:
        problems.append(Problem(f"the model needs {_some(missing)}, which the file has not got", where, fix))
    if unexpected:
        name = min(unexpected)
        near = get_close_matches(name, known, n=1) if len(known) < 10_000 else []
        hint = f"; the nearest the model has is {near[0]}" if near else ""
        problems.append(
            Problem(f"the file has {_some(unexpected)}, which the model has not{hint}", where, fix)
        )
    return problems


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:_MOST_NAMES])
    return shown if len(names) <= _MOST_NAMES else f"{shown} and {len(names) - _MOST_NAMES} more"


def _shapes(state: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> list[Problem]:
    return [
        Problem(
            f"{key} has shape {list(value.shape)}, the model wants {list(expected[key].shape)}",
            where,
            "check model.kwargs",
        )
        for key, value in state.items()
        if isinstance(value, Tensor) and key in expected and value.shape != expected[key].shape
    ]


def ties_of(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]


def tie(model: nn.Module, ties: list[list[str]]) -> None:
    """Makes one parameter of each list of names again: that of the first."""
    for first, *others in ties:
        parameter = model.get_parameter(first)
        for name in others:
            path, _, attribute = name.rpartition(".")
            model.get_submodule(path)._parameters[attribute] = parameter


def _with_fuser(edit: Edit, model: nn.Module, consent: Consent, folder: Path | None, mode: str) -> Edit:
    """An opaque edit with the module that its fuser makes of the fresh members."""
    if not isinstance(edit, Opaque):
        return edit
    fuser = load_object(edit.fuser, consent, folder)
    try:
        # Other objects, as every edit has them: a fuser may change what it is given.
        members = [shallow_copy(model.get_submodule(path)) for path in edit.members]
        result = fuser(mode == "qat", *members)
    except Exception as error:  # whatever somebody's fuser may raise, and members that are not there
        raise UsageError(Problem(f"raised {type(error).__name__}: {error}", f"fuser {edit.fuser}")) from error
    if not isinstance(result, nn.Module):
        message = f"returned a {type(result).__name__}, not an nn.Module"
        raise UsageError(Problem(message, f"fuser {edit.fuser}"))
    return replace(edit, result=result)
