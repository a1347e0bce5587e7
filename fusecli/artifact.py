"""Fused artifacts: reading the manifest, and loading one into a freshly built model as any user would."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from fusecli import rewrite
from fusecli.blame import code_failed
from fusecli.checkpoint import AVERAGED, Checkpoint, open_checkpoint
from fusecli.consent import Consent, load_object
from fusecli.errors import FusecliError, Problem, UsageError
from fusecli.graph.followers import LeftBehind, following
from fusecli.graph.loading import adapts_names, versions_of
from fusecli.graph.undrawn import Undrawn
from fusecli.nn.duplicate import tensors_held
from fusecli.nn.shallow import shallow_copy
from fusecli.outcome import Mode
from fusecli.rewrite import Edit, Manifest, ModuleTree, Opaque, apply_edits

_MOST_NAMES = 3
_FOLDED = "leave out the groups that the model's loading code needs as they were"


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
    model: nn.Module,
    artifact: Checkpoint,
    consent: Callable[[], Consent],
    folder: Path | None = None,
    *,
    lend: bool = False,
) -> nn.Module:
    """`load_fused` on an open artifact; the fusers of opaque edits are files relative to `folder`.

    With `lend` parameters are the file's own memory, as long as it is open: nobody may write to them."""
    manifest = manifest_of(artifact)
    edits = manifest.edits
    where = str(artifact.path)
    if any(isinstance(edit, Opaque) for edit in edits):
        model.eval()  # as the members were when fuse called the fuser
        edits = tuple(_with_fuser(edit, model, consent(), folder, manifest.mode) for edit in edits)
    replay(model, edits, where)
    state = loaded(artifact, parameter_names(model) if lend else ())
    for name in manifest.learned:
        state.pop(name, None)
    state._metadata = versions_of(model)  # type: ignore[attr-defined]
    load_strictly(model, state, where, remedy=_FOLDED)
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


def loaded(checkpoint: Checkpoint, lent: Collection[str] = ()) -> OrderedDict[str, Any]:
    """The checkpoint's state dict, as memory of our own: the file may go away. Those of `lent` are the file's
    own, as long as it is open; nobody may write to them."""
    state: OrderedDict[str, Any] = OrderedDict(
        (name, stored.load() if name in lent else stored.load().clone())
        for name, stored in checkpoint.tensors.items()
    )
    state.update(copy.deepcopy(dict(checkpoint.others)))
    if checkpoint.versions:
        state._metadata = checkpoint.versions  # type: ignore[attr-defined]
    return state


def parameter_names(model: nn.Module) -> Collection[str]:
    return dict(model.named_parameters(remove_duplicate=False)).keys()


def without_numbers(build: Callable[[], nn.Module]) -> nn.Module:
    """A fresh model whose parameters are on the meta device: they are about to be loaded. With numbers, where
    its code makes something else of them.

    Buffers and other tensors have theirs: no checkpoint need hold those.
    """

    def on_meta(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if type(parameter) is not nn.Parameter or parameter.is_meta or is_lazy(parameter):
            return None
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]  # it may answer
    try:
        with Undrawn():
            model = build()
    except UsageError:
        return build()  # a factory that computes with its weights
    finally:
        handle.remove()
    registered = {id(parameter) for parameter in model.parameters()}
    held = (tensor for module in model.modules() for _, tensor in tensors_held(module))
    made = any(tensor.is_meta and id(tensor) not in registered for tensor in held)
    return build() if made else model


def lent(load: Callable[[], nn.Module]) -> nn.Module | None:
    """The model that was built without numbers and loaded; None where that is not possible: somebody keeps a
    parameter that has none, or copies what is loaded into it."""
    try:
        model = load()
    except UsageError:
        return None
    return None if any(parameter.is_meta for parameter in model.parameters()) else model


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


def load_strictly(
    model: nn.Module,
    state: Mapping[str, Any],
    where: str,
    joined: Collection[str] = (),
    remedy: str = "load_state_dict ends so too",
) -> None:
    """Loads every tensor in its stored dtype. What the model keeps of them elsewhere (a list, a view, a
    closure) has the loaded numbers too, and parameters that were one object stay one, with the last one's.

    joined  names of tensors that share memory, and go on to
    remedy  what to do about loading code of the model's that raises

    Raises UsageError naming missing and unexpected keys, shapes that differ, and what cannot be loaded so
    that all who look at it see it.
    """
    require_shapes(model)
    expected = model.state_dict()
    # Counters of training: old checkpoints have none, and inference does not read them.
    needed = {key for key in expected if key != AVERAGED and not key.endswith("num_batches_tracked")}
    problems = _differences(needed - state.keys(), state.keys() - expected.keys(), expected.keys(), where)
    problems += _shapes(state, expected, where)
    problems += _integers(state, dict(model.named_parameters(remove_duplicate=False)), where)
    if problems and not adapts_names(model):
        raise UsageError(*problems)
    ties = ties_of(model)
    moved = OrderedDict(
        (key, _at_home(value, expected.get(key)) if isinstance(value, Tensor) else value)
        for key, value in state.items()
    )
    if (versions := getattr(state, "_metadata", None)) is not None:
        moved._metadata = versions  # type: ignore[attr-defined]
    known = list(expected)
    del expected  # it looks at the memory that the model was built with
    try:
        with following(model, joined):
            outcome = _loaded_by(model, moved)
    except LeftBehind as left:
        raise UsageError(Problem(str(left), where, left.remedy)) from left
    except RuntimeError as error:
        said = str(error).partition("\n\t")[2].strip() or str(error)
        fix = "check that the file belongs to this model, and what the model's own loading hooks ask for"
        raise UsageError(Problem(f"the model does not take its tensors: {said}", where, fix)) from error
    except Exception as error:  # whatever somebody's loading code may raise
        what = f"{type(model).__name__} cannot load it: {type(error).__name__}: {error}"
        raise UsageError(Problem(what, where, remedy)) from error
    if outcome is None and problems:  # a load_state_dict that says nothing of what was missing
        raise UsageError(*problems)
    missing = needed.intersection(outcome.missing_keys) if outcome else set()
    unexpected = outcome.unexpected_keys if outcome else []
    if missing or unexpected:
        raise UsageError(*_differences(missing, unexpected, known, where))
    tie(model, ties)


def _loaded_by(model: nn.Module, state: Mapping[str, Any]) -> Any:
    """What the model's load_state_dict returns: torch's, or one of its own that takes less than torch's."""
    takes = inspect.signature(model.load_state_dict).parameters
    if any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        return model.load_state_dict(state, strict=False, assign=True)
    if "assign" not in takes:  # what it copies has the dtype of the file all the same
        _give_dtypes(model, state)
    said = {"strict": False, "assign": True}
    return model.load_state_dict(state, **{name: value for name, value in said.items() if name in takes})


def _give_dtypes(model: nn.Module, state: Mapping[str, Any]) -> None:
    for path, module in model.named_modules(remove_duplicate=False):
        places: tuple[dict[str, Tensor | None], ...] = (module._parameters, module._buffers)
        for name, held in ((name, held) for place in places for name, held in place.items()):
            given = state.get(f"{path}.{name}" if path else name)
            if held is None or not isinstance(given, Tensor) or given.dtype == held.dtype:
                continue
            fresh = torch.empty_like(held, dtype=given.dtype, requires_grad=False)
            is_parameter = isinstance(held, nn.Parameter)
            setattr(module, name, nn.Parameter(fresh, held.requires_grad) if is_parameter else fresh)


def require_shapes(model: nn.Module) -> None:
    """Raises UsageError for a model with lazy layers that have not run yet."""
    lazy = [
        name for name, tensor in chain(model.named_parameters(), model.named_buffers()) if is_lazy(tensor)
    ]
    if lazy:
        fix = "let the factory run the model once before it returns it"
        raise UsageError(Problem(f"{_some(lazy)} has no shape yet", type(model).__name__, fix))


def _at_home(tensor: Tensor, place: Any) -> Tensor:
    return tensor if not isinstance(place, Tensor) or place.is_meta else tensor.to(place.device)


def _differences(
    missing: Collection[str], unexpected: Collection[str], known: Collection[str], where: str
) -> list[Problem]:
    fix = "check model.factory and kwargs, and checkpoint.key if the file holds several models"
    if prefix := _wrapper(missing, unexpected):
        what = f"the model's names begin with '{prefix}', those of the file do not: it is wrapped"
        return [Problem(what, where, "let the factory return the model itself")]
    if missing and (prefix := _wrapper(unexpected, known)):
        what = f"the file's names begin with '{prefix}', those of the model do not: another class held it"
        fix = f"name the prefix in the spec: checkpoint: {{strip_prefix: ['{prefix}']}}"
        return [Problem(what, where, fix)]
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


def _wrapper(missing: Collection[str], unexpected: Collection[str]) -> str:
    """The prefix that makes the names of the file those of the model: of torch.compile, or of another class
    that holds the model."""
    if not missing:
        return ""
    first = min(missing, key=len)
    prefix = next((first.removesuffix(name) for name in unexpected if first.endswith(f".{name}")), "")
    return prefix if prefix and all(name.removeprefix(prefix) in unexpected for name in missing) else ""


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


def _integers(state: Mapping[str, Any], parameters: Mapping[str, Tensor], where: str) -> list[Problem]:
    """A parameter is trained, and integers are not: such a file holds a quantized model."""
    return [
        Problem(
            f"{key} is {str(value.dtype).removeprefix('torch.')}, and the model's parameter is not",
            where,
            "give the float checkpoint: integers mean nothing without their scales",
        )
        for key, value in state.items()
        if isinstance(value, Tensor)
        and key in parameters
        and not (value.is_floating_point() or value.is_complex())
        and parameters[key].requires_grad
    ]


def ties_of(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tied for tied in names.values() if len(tied) > 1]


def tie(model: nn.Module, ties: list[list[str]]) -> None:
    """Makes one parameter of each list of names again: that of the last, which load_state_dict copies
    last."""
    for *others, last in ties:
        parameter = model.get_parameter(last)
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
        fix = "load it with the fuser it was made with"
        raise UsageError(code_failed(error, "it", f"fuser {edit.fuser}", fix)) from error
    if not isinstance(result, nn.Module):
        message = f"returned a {type(result).__name__}, not an nn.Module"
        raise UsageError(Problem(message, f"fuser {edit.fuser}"))
    return replace(edit, result=result)
