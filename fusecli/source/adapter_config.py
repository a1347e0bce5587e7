"""What PEFT's adapter_config.json says of an adapter: its strength, and that it is W + scale B A and no more.

Read by an allow-list: a later PEFT may write a key that changes what the adapter computes, and a merge that
does not know the key would be silently wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fusecli.errors import Problem, RefusedError, UsageError

CONFIG = "adapter_config.json"
_LIMIT = 1 << 20
_LARGEST = 1e300
# Where it came from, which layers were asked for (the tensors say which got it), what acts in training only.
_HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
# What `_strength` reads.
_READ = frozenset({"lora_alpha", "r", "rank_pattern", "use_rslora"})
# The only values at which these are W + scale B A with the base as it is stored.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
# What is known of the others where they are set.
_OTHERWISE = {
    "alora_invocation_tokens": "it acts on the tokens behind an invocation only (aLoRA)",
    "alpha_pattern": "each layer has an alpha of its own",
    "arrow_config": "it is one of several that a router chooses from (Arrow)",
    "bias": "biases of the base were trained too",
    "corda_config": "the base was changed too (CorDA)",
    "eva_config": "what it began from is taken from the base (EVA)",
    "fan_in_fan_out": "its weights are stored as [in, out]",
    "init_lora_weights": "the base was changed too",
    "layer_replication": "it repeats layers of the base",
    "loftq_config": "the base was changed too (LoftQ)",
    "lora_bias": "its B has a bias",
    "lora_ga_config": "the base was changed too (LoRA-GA)",
    "modules_to_save": "it replaces whole modules",
    "peft_type": "only LORA is W + scale B A",
    "target_parameters": "it adapts parameters, not layers",
    "trainable_token_indices": "it replaces rows of an embedding",
    "use_dora": "DoRA scales the sum by its own norm",
    "use_qalora": "its A acts on pooled inputs (QALoRA)",
}


_UNKNOWN = "what the adapter computes then is not known here"
_LONGEST = 40  # letters of a value in a message


class Strength(NamedTuple):
    """alpha / rank: `divided` says by what of the rank, `rank` what every layer is said to have."""

    alpha: float
    divided: str  # "rank" or "root"
    rank: int | None


def configured(folder: Path, where: str) -> Strength:
    """The strength that the configuration in `folder` gives.

    Raises UsageError where it gives none, RefusedError where it says that the adapter is something else than
    W + scale B A.
    """
    path = folder / CONFIG
    config = _read(path, where)
    _require_plain(config, str(path))
    return _strength(config, str(path))


def require_plain(folder: Path) -> None:
    """Raises RefusedError where a configuration lies in `folder` that says that the adapter is something else
    than W + scale B A: a scale that somebody gives does not change that."""
    path = folder / CONFIG
    if path.is_file():
        _require_plain(_read(path, str(path)), str(path))


def _require_plain(config: Mapping[str, Any], label: str) -> None:
    fix = "merge it with the library that trained it, and fuse the result"
    problems = [
        Problem(f"{key} is {_shown(value)}: {_OTHERWISE.get(key, _UNKNOWN)}", label, fix)
        for key, value in config.items()
        if not _is_plain(key, value)
    ]
    if problems:
        raise RefusedError(*problems)


def _is_plain(key: str, value: Any) -> bool:
    if key in _HARMLESS or key in _READ:
        return True
    # By type too: 1 is no True.
    if any(type(value) is type(plain) and value == plain for plain in _PLAIN.get(key, ())):
        return True
    # What PEFT writes for a feature that is off, whichever it is: no feature, none that could do anything.
    return key not in _PLAIN and (value is None or value is False or value in ("", [], {}))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _strength(config: Mapping[str, Any], label: str) -> Strength:
    alpha, rank, root = config.get("lora_alpha"), config.get("r"), config.get("use_rslora", False)
    # Compared, not converted: JSON may hold whole numbers that no float can.
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not -_LARGEST < alpha < _LARGEST:
        raise UsageError(Problem(f"lora_alpha is {alpha!r}, not a number", label))
    if type(rank) is not int or rank < 1:
        raise UsageError(Problem(f"r is {rank!r}, not a whole number from 1", label))
    if type(root) is not bool:
        raise UsageError(Problem(f"use_rslora is {root!r}, not true or false", label))
    said = None if config.get("rank_pattern") else rank
    return Strength(float(alpha), "root" if root else "rank", said)


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT + 1)
    except OSError as error:
        fix = "add scale: 2.0, or alpha: 16 (alpha / rank is the scale), to the adapter"
        reason = error.strerror or str(error)
        raise UsageError(
            Problem(f"nothing says its scale: {CONFIG} beside it: {reason}", where, fix)
        ) from None
    if len(data) > _LIMIT:
        raise UsageError(Problem("is larger than 1 MiB", str(path), "is it the one that PEFT has written?"))
    try:
        config = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(Problem(f"is no JSON: {error}", str(path))) from None
    if not isinstance(config, dict):
        raise UsageError(Problem("is no JSON object", str(path)))
    return config
