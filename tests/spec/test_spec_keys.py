"""Every key of a spec: what it holds, what it refuses, and where that is said."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from fusecli.spec import InputSpec, Spec

Read = Callable[[str | bytes], Spec]
Wrong = Callable[[str | bytes], list[str]]

EVERYTHING = """\
version: 1
checkpoint: {key: state_dict, strip_prefix: ["module."]}
model: {factory: "myproj.models:build", kwargs: {num_classes: 10}}
inputs:
  - {shape: [2, 3, 224, 224]}
  - {shape: [2, 16], dtype: int64, range: [0, 1000]}
  - [{shape: [1]}, [{shape: []}, {file: samples.safetensors, key: tokens}]]
  - {shape: [2], name: mask, dynamic: [0]}
qat: false
groups:
  - [conv1, bn1, relu1]
  - ["layer*.*.conv1", "layer*.*.bn1"]
  - {modules: [up, bn_up], kind: conv_transpose2d, groups: 2, eps: 1.0e-3, stride: [2, 1]}
assume: {eps: 1.0e-5, transposed: false}
discover: false
exclude: ["head.*"]
extra_mappings:
  - {sequence: [torch.nn.Conv2d, myproj.layers.MyNorm], fuser: "myproj.fusers:fuse_conv_mynorm"}
  - {treat: myproj.layers.MyBatchNorm, as: torch.nn.BatchNorm2d}
verify: {seed: 7, samples: 2}
output: {format: safetensors, dtype: keep}
bake: true
adapter: {file: adapter.safetensors, scale: -0.5}
"""

UNKNOWN = {
    "top": ("grops: []", "1:1: key 'grops' is unknown; did you mean 'groups'?"),
    "checkpoint": ("checkpoint: {keys: a}", "1:14: key 'keys' is unknown; did you mean 'key'?"),
    "adapter": ("adapter: {file: a, scal: 1}", "1:20: key 'scal' is unknown; did you mean 'scale'?"),
    "model": ("model: {factory: 'a:b', kwarg: {}}", "1:25: key 'kwarg' is unknown; did you mean 'kwargs'?"),
    "inputs": ("inputs:\n- {shpe: [1], shape: [1]}", "2:4: key 'shpe' is unknown; did you mean 'shape'?"),
    "nested inputs": (
        "inputs:\n- [[{shape: [1], dtyp: bool}]]",
        "2:18: key 'dtyp' is unknown; did you mean 'dtype'?",
    ),
    "groups": (
        "groups:\n- [a, b]\n- {modul: [a, b], modules: [a, b]}",
        "3:4: key 'modul' is unknown; did you mean 'modules'?",
    ),
    "assume": ("assume: {epz: 1}", "1:10: key 'epz' is unknown; did you mean 'eps'?"),
    "mappings": (
        "extra_mappings:\n- {treat: a.B, as: c.D, fusr: 1}",
        "2:25: key 'fusr' is unknown; did you mean 'fuser'?",
    ),
    "verify": ("verify: {sample: 1}", "1:10: key 'sample' is unknown; did you mean 'samples'?"),
    "output": ("output: {fmt: pt}", "1:10: key 'fmt' is unknown; did you mean 'format'?"),
    "nothing near": ("verify: {zzz: 1}", "1:10: key 'zzz' is unknown; use one of: seed, samples"),
    "alias of a field": (
        "extra_mappings:\n- {treat: a.B, as: c.D, as_: c.D}",
        "2:25: key 'as_' is unknown; did you mean 'as'?",
    ),
    "provenance": ("sha256: abc", "1:1: key 'sha256' is unknown"),
}

REFUSED = {
    "a version to come": (
        "version: 2",
        "1:10: version 2 is unknown to this fusecli, which knows 1; write version: 1",
    ),
    "qat": ("qat: true\nbake: true", "1:1: bake cannot go with qat: true, which trains and folds nothing"),
    "discover": ("discover: maybe", "1:11: "),
    "bake": ("bake: yes", "1:7: true or false is expected"),
    "no adapter file": ("adapter: {scale: 2}", "1:1: key 'file' is missing"),
    "an adapter as text": ("adapter: a.safetensors", "1:10: a mapping is expected"),
    "scale and alpha": ("adapter: {file: a, scale: 1, alpha: 2}", "1:1: an adapter has a scale or an alpha"),
    "a scale as text": ("adapter: {file: a, scale: '2'}", "1:27: a number is expected, found '2'"),
    "an infinite scale": ("adapter: {file: a, scale: .inf}", "1:27: a finite number is expected"),
    "target": ("target: qunt", "1:9: target 'qunt' is unknown; did you mean 'quant'?"),
    "shared": ("shared: yes", "1:9: "),
    "groups as text": ("groups: conv1", "1:9: a list is expected, found 'conv1'"),
    "no groups": ("groups:", "1:8: a list is expected, found nothing"),
    "a section as list": ("verify: [1]", "1:1: a mapping is expected, found a list"),
    "a group as mapping of names": (
        "groups: [{conv1: bn1, modules: [a, b]}]",
        "1:11: key 'conv1' is unknown",
    ),
    "kind": (
        "groups:\n- {modules: [a, b], kind: conv_2d}",
        "2:27: kind 'conv_2d' is unknown; did you mean 'conv2d'?",
    ),
    "kind of a norm": (
        "groups:\n- {modules: [a, b], kind: 3}",
        "2:27: kind '3' is unknown; use one of: conv1d,",
    ),
    "group count": ("groups:\n- {modules: [a, b], groups: 0}", "2:29: this is at least 1"),
    "stride": ("groups:\n- {modules: [a, b], stride: [2, 0]}", "2:33: this is at least 1"),
    "name is a list": ("groups:\n- [a, [b]]", "2:7: a name is expected, found a list"),
    "name is empty": ("groups:\n- [a, '']", "2:7: a name is expected, found nothing"),
    "double star": ("exclude: ['head.**']", "1:11: 'head.**' has '**', which is no wildcard here"),
    "no factory": ("model: {kwargs: {}}", "1:1: key 'factory' is missing"),
    "factory without callable": (
        "model: {factory: a.b}",
        "1:18: 'a.b' does not name Python code; write 'package.module:callable'",
    ),
    "factory with spaces": ("model: {factory: 'a b:c'}", "1:18: 'a b:c' does not name Python code"),
    "factory call": ("model: {factory: 'a:b()'}", "1:18: 'a:b()' does not name Python code"),
    "factory in a text file": (
        "model: {factory: '/x/net.txt:b'}",
        "1:18: '/x/net.txt:b' does not name Python code",
    ),
    "seed": ("verify: {seed: -1}", "1:16: a seed is at least 0"),
    "memory": ("verify: {memory: lots}", "1:18: a size is written as 512MB or 4GB, found 'lots'"),
    "negative memory": ("verify: {memory: -1}", "1:18: a size is written as 512MB or 4GB, found '-1'"),
    "huge seed": ("verify: {seed: 9223372036854775808}", "1:16: a seed is at least 0"),
    "format": (
        "output: {format: safetensor}",
        "1:18: format 'safetensor' is unknown; did you mean 'safetensors'?",
    ),
    "dtype": ("output: {dtype: float16}", "1:17: dtype 'float16' is unknown; use one of: keep"),
    "half a mapping": (
        "extra_mappings:\n- {treat: a.B}",
        "2:3: an extra mapping is a sequence with its fuser",
    ),
    "both mappings": (
        "extra_mappings:\n- {treat: a.B, as: c.D, fuser: 'e:f'}",
        "2:3: an extra mapping is a sequence",
    ),
    "empty sequence": (
        "extra_mappings:\n- {sequence: [], fuser: 'e:f'}",
        "2:4: this sequence is empty",
    ),
    "a name alone, and no fuser for one class": (
        "groups: [[block]]\nextra_mappings:\n- {sequence: [a.B, a.C], fuser: 'e:f'}",
        "1:10: a group needs at least two names",
    ),
    "bare class": (
        "extra_mappings:\n- {treat: MyNorm, as: torch.nn.BatchNorm2d}",
        "2:11: 'MyNorm' does not name a class",
    ),
    "no shape": ("inputs: [{dtype: int64}]", "1:10: an input has a shape or a file; write"),
    "shape and file": (
        "inputs: [{shape: [1], file: a, key: b}]",
        "1:10: an input has a shape or a file, not both",
    ),
    "file without key": ("inputs: [{file: a}]", "1:10: key is missing"),
    "key without file": (
        "inputs: [{shape: [1], key: b}]",
        "1:10: key belongs to an input that is read from a file",
    ),
    "dtype of a file": ("inputs: [{file: a, key: b, dtype: int8}]", "1:10: dtype cannot go with a file"),
    "size 0": ("inputs: [{shape: [2, 0]}]", "1:22: this is at least 1"),
    "size text": ("inputs: [{shape: [2, n]}]", "1:22: a whole number is expected, found 'n'"),
    "size octal": ("inputs: [{shape: [010]}]", "1:19: '010' is octal in some"),
    "far too big": (
        "inputs: [{shape: [65536, 65536, 65536]}]",
        "1:11: this shape has more than 2**31 elements",
    ),
    "torch dtype": (
        "inputs: [{shape: [1], dtype: torch.int64}]",
        "1:30: dtype 'torch.int64' is unknown; did you mean 'int64'?",
    ),
    "empty range": ("inputs: [{shape: [1], range: [1, 1]}]", "1:23: a range is [low, high) with low < high"),
    "one end": ("inputs: [{shape: [1], range: [1]}]", "1:23: a range is [low, high) with low < high"),
    "nan range": (
        "inputs: [{shape: [1], range: [.nan, 1]}]",
        "1:31: a finite number is expected, found '.nan'",
    ),
    "range past dtype": (
        "inputs: [{shape: [1], dtype: uint8, range: [0, 257]}]",
        "1:10: the range does not fit uint8; uint8 holds [0, 256)",
    ),
    "broken range": (
        "inputs: [{shape: [1], dtype: int8, range: [0, 1.5]}]",
        "1:10: the range of an int8 input is of whole numbers",
    ),
    "bool range": ("inputs: [{shape: [1], dtype: bool, range: [0, 1]}]", "1:10: a bool input has no range"),
    "axis past the shape": (
        "inputs: [{shape: [1, 2], dynamic: [0, 2]}]",
        "1:10: the shape has no axis 2; axes are counted from 0; the last is 1",
    ),
    "negative axis": (
        "inputs: [{shape: [1], dynamic: [-1]}]",
        "1:33: an axis is counted from 0, found -1",
    ),
    "axis twice": (
        "inputs: [{shape: [1], dynamic: [0, 0]}]",
        "1:23: an axis is named twice; name each once, for example dynamic: [0, 2, 3]",
    ),
    "positional last": (
        "inputs:\n- {shape: [1], name: a}\n- {shape: [1]}",
        "1:1: a positional input stands after a named one",
    ),
    "same keyword": (
        "inputs:\n- {shape: [1], name: a}\n- {shape: [1], name: a}",
        "1:1: two inputs are named 'a'",
    ),
    "name in a tuple": ("inputs:\n- [{shape: [1], name: a}]", "1:1: a tensor inside a tuple has a name"),
    "a slip in a mapping": (
        "inputs:\n- {image: {shape: [1]}, mask: {shpe: [1]}}",
        "2:32: key 'shpe' is unknown; did you mean 'shape'?",
    ),
    "a slip far inside": (
        "inputs:\n- {a: [{b: {shape: [1], dtype: flot32}}]}",
        "2:32: dtype 'flot32' is unknown; did you mean 'float32'?",
    ),
    "a name that holds no entry": (
        "inputs:\n- {image: {shape: [1]}, mask: 3}",
        "2:31: a mapping is expected",
    ),
    "a tensor beside its own keys": (
        "inputs:\n- {shape: [1], image: {shape: [1]}}",
        "2:16: key 'image' is unknown",
    ),
    "sizes without their key": ("inputs:\n- {image: [1, 3]}", "2:4: key 'image' is unknown"),
    "an empty mapping": ("inputs:\n- {}", "2:3: an input has a shape or a file"),
    "an empty entry of a mapping": ("inputs:\n- {image: {}}", "2:4: an input has a shape or a file"),
    "name in a mapping": (
        "inputs:\n- {image: {shape: [1], name: a}}",
        "1:1: a tensor inside a mapping has a name",
    ),
    "a mapping behind a name": (
        "inputs:\n- {shape: [1], name: a}\n- {image: {shape: [1]}}",
        "1:1: a positional input stands after a named one",
    ),
    "no keyword": (
        "inputs:\n- {shape: [1], name: a-b}",
        "2:22: 'a-b' cannot be the name of a forward argument",
    ),
    "one input": ("inputs: {shape: [1]}", "1:1: a list is expected, found a mapping"),
}


@pytest.mark.parametrize(
    ("text", "message"), [*UNKNOWN.values(), *REFUSED.values()], ids=[*UNKNOWN, *REFUSED]
)
def test_is_refused_where_it_stands(wrong: Wrong, text: str, message: str) -> None:
    problems = wrong(text)
    assert problems[0].startswith(f"fuse.yaml:{message}"), problems


@pytest.mark.parametrize(("text", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_slip_hides_no_other_problem(wrong: Wrong, text: str, message: str) -> None:
    problems = wrong(f"{text}\noutputs: 1\n" if text != "output: {fmt: pt}" else f"{text}\nqat: 1\n")
    assert problems[0].startswith(f"fuse.yaml:{message}")
    assert len(problems) > 1


def test_everything_that_can_be_said(read: Read) -> None:
    spec = read(EVERYTHING)
    assert spec.checkpoint.key == "state_dict"
    assert spec.checkpoint.strip_prefix == ("module.",)
    assert spec.model is not None
    assert (spec.model.factory, spec.model.kwargs) == ("myproj.models:build", {"num_classes": 10})
    tensor, tokens, (single, (scalar, stored)), mask = spec.inputs  # type: ignore[misc]
    assert (tensor.shape, tensor.dtype, tensor.range) == ((2, 3, 224, 224), None, None)
    assert (tokens.dtype, tokens.range) == ("int64", (0, 1000))
    assert (single.shape, scalar.shape, mask.name) == ((1,), (), "mask")
    assert (stored.file, stored.key) == ("samples.safetensors", "tokens")
    up = spec.groups[2]
    assert (up.modules, up.kind, up.groups, up.eps, up.stride) == (
        ("up", "bn_up"),
        "conv_transpose2d",
        2,
        1e-3,
        (2, 1),
    )
    assert (spec.assume.eps, spec.assume.transposed) == (1e-5, False)
    assert spec.exclude == ("head.*",)
    fuse, treat = spec.extra_mappings
    assert fuse.sequence == ("torch.nn.Conv2d", "myproj.layers.MyNorm")
    assert (fuse.fuser, treat.treat, treat.as_) == (
        "myproj.fusers:fuse_conv_mynorm",
        "myproj.layers.MyBatchNorm",
        "torch.nn.BatchNorm2d",
    )
    assert (spec.verify.seed, spec.verify.samples) == (7, 2)
    assert (spec.output.format, spec.output.dtype) == ("safetensors", "keep")


def test_nothing_needs_to_be_said(read: Read) -> None:
    assert read("{}") == Spec()
    assert read("version: 1\nmodel: null\ncheckpoint: {key: ~}\nassume: {eps: }\n") == Spec()
    assert (Spec().verify.seed, Spec().verify.samples) == (0, 4)


def test_an_input_may_be_a_dict_of_inputs(read: Read) -> None:
    """A name of the dict may be a key of an entry: what it holds tells which of them it is."""
    text = """
inputs:
- image: {shape: [2, 3]}
  shape: {shape: [], dtype: int64, range: [0, 5]}
  file: {file: a.safetensors, key: b}
  1: [{shape: [1]}, {inner: {shape: [4]}}]
- {shape: [7], name: scale}
"""
    batch, scale = read(text).inputs
    assert isinstance(batch, dict)
    assert list(batch) == ["image", "shape", "file", "1"]
    assert batch["image"] == InputSpec(shape=(2, 3))
    assert batch["shape"] == InputSpec(shape=(), dtype="int64", range=(0, 5))
    assert batch["file"] == InputSpec(file="a.safetensors", key="b")
    assert batch["1"] == (InputSpec(shape=(1,)), {"inner": InputSpec(shape=(4,))})
    assert isinstance(scale, InputSpec)
    assert scale.name == "scale"


@pytest.mark.parametrize(
    "factory",
    [
        "pkg:build",
        "pkg.mod:Net.tiny",
        "net.py:build",
        "/abs/my net.py:build",
        "../x/net.py:Net",
        "C:\\net.py:n",
    ],
)
def test_code_is_named_by_module_or_file(read: Read, factory: str) -> None:
    spec = read(f"model: {{factory: '{factory}'}}")
    assert spec.model is not None
    assert spec.model.factory == factory


def test_one_stride_stands_for_all_dimensions(read: Read) -> None:
    assert read("groups:\n- {modules: [a, b], stride: 2}").groups[0].stride == (2,)


def test_a_spec_cannot_be_changed(read: Read) -> None:
    spec = read(EVERYTHING)
    with pytest.raises(ValidationError):
        spec.groups = ()
    with pytest.raises(ValidationError):
        spec.verify.seed = 3


def test_a_spec_knows_its_file_and_where_each_thing_stands(read: Read) -> None:
    spec = read(EVERYTHING)
    assert spec.source == Path("fuse.yaml")
    assert spec.sha256 == hashlib.sha256(EVERYTHING.encode()).hexdigest()
    assert spec.where(("groups", 0)) == "fuse.yaml:11:5"
    assert spec.where(("groups", 0, "modules", 1)) == "fuse.yaml:11:13"
    assert spec.where(("groups", 2, "modules", 1)) == "fuse.yaml:13:20"
    assert spec.where(("groups", 2, "eps")) == "fuse.yaml:13:68"
    assert spec.where(("inputs", 2, 1, 0, "shape")) == "fuse.yaml:7:22"
    assert spec.where(("groups", 99)) == "fuse.yaml:10:1"
    assert spec.where(("verify",)) == "fuse.yaml:20:1"


def test_where_survives_a_changed_copy(read: Read) -> None:
    copy = read(EVERYTHING).model_copy(update={"discover": False})
    assert copy.where(("groups", 0)) == "fuse.yaml:11:5"


def test_two_files_that_say_the_same_are_equal(read: Read) -> None:
    assert read("groups: [[a, b]]") == read("# a comment\ngroups:\n  - [a, b]\n")
    assert read("groups: [[a, b]]") != read("groups: [[a, c]]")


@pytest.mark.parametrize(("text", "size"), [("4GB", 4 * 10**9), ("1 MiB", 2**20), ("0", 0), ("2048", 2048)])
def test_a_size_of_memory(read: Read, text: str, size: int) -> None:
    assert read(f"verify: {{memory: {text}}}\n").verify.memory == size


def test_no_size_of_memory_is_the_default() -> None:
    assert Spec().verify.memory is None
