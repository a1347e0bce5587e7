"""The manifest: what was done to a checkpoint, as one JSON string inside the artifact."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from fusecli.errors import Problem, UnsafeError, UsageError
from fusecli.nn import container_class
from fusecli.outcome import Evidence, Mode
from fusecli.rewrite.edits import (
    Bias,
    Bordered,
    Clone,
    Container,
    Edit,
    Identity,
    Opaque,
    Own,
    Passed,
    Plain,
    Remainder,
    Resize,
    Zero,
)

MANIFEST_KEY = "fusecli"  # the name of the manifest in safetensors metadata and in a state dict's _metadata
VERSION = 1
RESIZABLE = (
    *("in_channels", "out_channels", "in_features", "out_features"),
    *("kernel_size", "stride", "padding", "dilation"),
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KINDS = {"linear"} | {f"conv{way}{rank}d" for way in ("", "_transpose") for rank in (1, 2, 3)}
_EDITS: dict[str, type[Any]] = {
    cls.__name__.lower(): cls
    for cls in (
        Own,
        Plain,
        Resize,
        Bordered,
        Clone,
        Bias,
        Identity,
        Passed,
        Zero,
        Container,
        Remainder,
        Opaque,
    )
}


@dataclass(frozen=True)
class GroupRecord:
    """One fused group. `hints` is what its tensors cannot say: kind, groups, stride and eps."""

    modules: tuple[str, ...]
    rule: str
    evidence: Evidence
    kept: tuple[str, ...] = ()
    hints: Mapping[str, Any] = field(default_factory=dict)

    @property
    def planned(self) -> tuple[str, ...]:
        """The modules that the rule takes: what was kept may look as if it could be fused too, where nobody
        has the model's code or its run at hand."""
        return tuple(path for path in self.modules if path not in self.kept)


@dataclass(frozen=True)
class QuantizerRecord:
    """A scale and a zero point that were learned: the tensors `of`.scale and `of`.zero_point.

    of        what they quantize: "conv.weight", "conv.output"
    rescaled  learned for the weight before its norm was folded, and multiplied with it
    integers  the lowest and the highest integer that they were learned for; None: it was not noted
    """

    of: str
    rescaled: bool = False
    integers: tuple[int, int] | None = None

    @property
    def tensors(self) -> tuple[str, str]:
        return f"{self.of}.scale", f"{self.of}.zero_point"


@dataclass(frozen=True)
class TrainedRecord:
    """What a checkpoint of quantization-aware training held: see source.trained."""

    layout: str
    norms: Mapping[str, str]
    quantizers: tuple[QuantizerRecord, ...]


@dataclass(frozen=True)
class Manifest:
    """What was done, and to what.

    mode              "folded": for inference; "qat": to be trained with simulated quantization
    spec_sha256       of the spec as it was resolved (pipeline.fold.resolved_sha256)
    ties              names of the original checkpoint that were the very same memory
    adapter_sha256    of the adapter that is part of the weights; "": there is none
    trained           what quantization-aware training had made of the original checkpoint
    key, strip_prefix how the original checkpoint has to be opened, as it was found
    """

    mode: Mode
    groups: tuple[GroupRecord, ...]
    edits: tuple[Edit, ...]
    input_sha256: str
    spec_sha256: str
    versions: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    key: str = ""
    strip_prefix: tuple[str, ...] = ()
    adapter_sha256: str = ""
    trained: TrainedRecord | None = None

    @property
    def learned(self) -> frozenset[str]:
        """The tensors of the artifact that are no part of the model."""
        quantizers = self.trained.quantizers if self.trained else ()
        return frozenset(name for quantizer in quantizers for name in quantizer.tensors)

    def to_json(self) -> str:
        """Sorted keys, no timestamps, no paths: the same work gives the same bytes."""
        document = {
            "version": VERSION,
            "mode": self.mode,
            "groups": [asdict(group) | {"evidence": str(group.evidence)} for group in self.groups],
            "edits": [_edit_to_dict(edit) for edit in self.edits],
            "input_sha256": self.input_sha256,
            "spec_sha256": self.spec_sha256,
            "versions": dict(self.versions),
            "ties": [list(tie) for tie in self.ties],
            "key": self.key,
            "strip_prefix": list(self.strip_prefix),
            "adapter_sha256": self.adapter_sha256,
            **({"trained": asdict(self.trained)} if self.trained else {}),
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Reads a manifest that may come from anybody; raises UnsafeError where it is not one of ours."""
        try:
            document = json.loads(text)
            # True and 1.0 are equal to 1, and no version that was ever written.
            if type(document["version"]) is not int or document["version"] != VERSION:
                raise UnsafeError(
                    Problem(
                        f"the manifest has version {document['version']!r}, this fusecli reads {VERSION}",
                        where,
                        "use the fusecli that wrote it, or fuse again",
                    )
                )
            if document["mode"] == "int8":
                what = "it is an int8 model, not a float checkpoint"
                raise UsageError(Problem(what, where, "give the float checkpoint it was made from"))
            if document["mode"] not in get_args(Mode):
                raise ValueError(f"the mode is {document['mode']!r}")
            return cls(
                mode=document["mode"],
                groups=tuple(_group_from_dict(group) for group in _list(document["groups"])),
                edits=tuple(_edit_from_dict(edit) for edit in _list(document["edits"])),
                input_sha256=_sha256(document["input_sha256"]),
                spec_sha256=_sha256(document["spec_sha256"]),
                versions=_versions(document["versions"]),
                ties=tuple(_tie(tie) for tie in document["ties"]),
                key=_text(document["key"]),
                strip_prefix=_names(document["strip_prefix"]),
                adapter_sha256=_sha256_or_none(document.get("adapter_sha256", "")),
                trained=_trained(document["trained"]) if "trained" in document else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UnsafeError(
                Problem("the fusecli manifest inside is damaged", where, f"fuse again ({error!r})")
            ) from error


def _edit_to_dict(edit: Edit) -> dict[str, Any]:
    # Not asdict(): it would deep-copy the module that an opaque edit carries.
    values = {f.name: getattr(edit, f.name) for f in fields(edit) if f.name != "result"}
    return {"edit": type(edit).__name__.lower(), **values}


def _edit_from_dict(document: dict[str, Any]) -> Edit:
    # What leaves its place for nothing has no layers that took it over.
    readers = {"members": _names if document["edit"] == "passed" else _one_or_more, "sizes": _sizes}
    values = {
        k: readers[k](v) if k in readers else v for k, v in document.items() if k not in ("edit", "result")
    }
    for name, value in values.items():
        if name not in readers and not isinstance(value, bool if name == "last" else str):
            raise TypeError(f"edit field {name!r} is {value!r}")
    if "cls" in values:
        container_class(str(values["cls"]))
    edit: Edit = _EDITS[document["edit"]](**values)
    if not edit.path or not getattr(edit, "into", "-"):
        raise ValueError("the model itself cannot be edited")
    return edit


def _group_from_dict(document: dict[str, Any]) -> GroupRecord:
    modules, kept = _one_or_more(document["modules"]), _names(document["kept"])
    if not set(kept) < set(modules):
        raise ValueError("a group keeps modules that are not in it, or all of them")
    return GroupRecord(
        modules=modules,
        rule=_name(document["rule"]),
        evidence=Evidence(document["evidence"]),
        kept=kept,
        hints=_hints(document["hints"]),
    )


def _trained(document: dict[str, Any]) -> TrainedRecord:
    norms = dict(document["norms"].items())
    quantizers = tuple(
        QuantizerRecord(q["of"], q["rescaled"], _integers(q.get("integers"))) for q in document["quantizers"]
    )
    texts = (*norms.keys(), *norms.values(), *(q.of for q in quantizers))
    if not all(isinstance(text, str) and text for text in texts):
        raise TypeError("what was trained has no name")
    if document["layout"] not in ("fused", "prepared") or not all(
        type(q.rescaled) is bool for q in quantizers
    ):
        raise ValueError(f"the layout is {document['layout']!r}")
    return TrainedRecord(document["layout"], norms, quantizers)


def _integers(values: Any) -> tuple[int, int] | None:
    """A range of integers that holds 0, of 8 bits at most."""
    if values is None:
        return None
    lowest, highest = values
    if not (type(lowest) is type(highest) is int and -128 <= lowest <= 0 < highest <= 255):
        raise ValueError(f"the integers are {values!r}")
    return lowest, highest


def _hints(values: Any) -> dict[str, Any]:
    """What a layer and a norm may be told to be: their kind, whole numbers, an eps."""
    readers = {"kind": _is_text, "groups": _is_count, "stride": _is_stride, "eps": _is_eps}
    hints = dict(values)
    for name, value in hints.items():
        if name not in readers or not readers[name](value):
            raise ValueError(f"the hint {name!r} is {value!r}")
    return hints


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value in _KINDS


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_stride(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 3 and all(map(_is_count, value))


def _is_eps(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def _sha256(value: Any) -> str:
    """A digest as hashlib writes it: whatever else stands there can be equal to that of no file."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{value!r} is no sha256, which has 64 hexadecimal digits")
    return value


def _sha256_or_none(value: Any) -> str:
    return value if value == "" else _sha256(value)


def _versions(values: Any) -> dict[str, str]:
    return {_name(name): _text(version) for name, version in values.items()}


def _tie(values: Any) -> tuple[str, ...]:
    names = _names(values)
    if len(set(names)) < 2:
        raise ValueError(f"{values!r} are not two names of one tensor")
    return names


def _list(values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError(f"expected a list, found {values!r}")
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, found {value!r}")
    return value


def _name(value: Any) -> str:
    if not _text(value):
        raise ValueError("a name is empty")
    return str(value)


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
        raise TypeError(f"expected a list of names, found {values!r}")
    return tuple(values)


def _one_or_more(values: Any) -> tuple[str, ...]:
    if not values:
        raise ValueError("a list of members is empty")
    return _names(values)


def _sizes(values: Any) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """The sizes of a layer: none that torch would not have, and none that could be more than a layer."""
    sizes = tuple((str(name), tuple(numbers)) for name, numbers in values)
    for name, numbers in sizes:
        whole = all(type(number) is int and 0 <= number < 1 << 31 for number in numbers)
        if name not in RESIZABLE or not 0 < len(numbers) <= 3 or not whole:
            raise ValueError(f"{name} cannot be {numbers!r}")
    return sizes
