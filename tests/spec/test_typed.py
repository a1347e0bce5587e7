"""--model and --input: what each text means, and which texts mean nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fusecli.errors import UsageError
from fusecli.spec import InputSpec, Spec, read_spec
from fusecli.spec.typed import Typed, spec_from_options

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "net.py:build": ("net.py:build", {}),
    "net.py:Net()": ("net.py:Net", {}),
    "sub/net.py:Net": ("sub/net.py:Net", {}),
    "pkg.models:Net": ("pkg.models:Net", {}),
    "pkg.models:Net.small": ("pkg.models:Net.small", {}),
    "  net.py:Net  ": ("net.py:Net", {}),
    "net.py:Net(width=8)": ("net.py:Net", {"width": 8}),
    "net.py:Net(width=8, name='small')": ("net.py:Net", {"width": 8, "name": "small"}),
    "net.py:Net(a=-1.5, b=1e-5, c=None)": (
        "net.py:Net",
        {"a": -1.5, "b": 1e-5, "c": None},
    ),
    "net.py:Net(a=[1, 2], b=(3, 4), c={'d': [5]})": (
        "net.py:Net",
        {"a": [1, 2], "b": (3, 4), "c": {"d": [5]}},
    ),
    "net.py:Net(url='a:b(c)')": ("net.py:Net", {"url": "a:b(c)"}),
    "net.py:Net(\n  width=8,\n)": ("net.py:Net", {"width": 8}),
}


@pytest.mark.parametrize("text", MODELS)
def test_a_model(text: str) -> None:
    factory, kwargs = MODELS[text]
    model = spec_from_options(None, Typed(model=text)).model
    assert model is not None
    assert (model.factory, dict(model.kwargs)) == (factory, kwargs)


PLAIN = "write keyword arguments with plain values: net.py:Net(width=8, name='small')"
NAMES = "write pkg.module:factory, net.py:Net or net.py:Net(width=8)"


@pytest.mark.parametrize(
    ("text", "said", "fix"),
    [
        ("", "names no factory", NAMES),
        ("Net", "names no factory", NAMES),
        ("net.py", "names no factory", NAMES),
        ("net.py:", "names no factory", NAMES),
        (":build", "names no factory", NAMES),
        ("net.py:Net(", "names no factory", NAMES),
        ("net.py:Net(8)) ", "cannot be read", PLAIN),
        ("net.py:Net(8)", "keyword arguments only", PLAIN),
        ("net.py:Net(**{'a': 1})", "keyword arguments only", PLAIN),
        ("net.py:Net(a=1, a=2)", "each of them once", PLAIN),
        ("net.py:Net(a=1)(b=2)", "keyword arguments only", PLAIN),
        ("net.py:Net(a=1).to(b=2)", "keyword arguments only", PLAIN),
        ("net.py:Net(a=1), f(b=2)", "keyword arguments only", PLAIN),
        ("net.py:Net(a=)", "cannot be read", PLAIN),
        ("net.py:Net(a=open('x'))", "cannot be read", PLAIN),
        ("net.py:Net(a=torch.float16)", "cannot be read", PLAIN),
        ("net.py:Net(a={[1]: 2})", "cannot be read", PLAIN),
        ("net.py:Net(a={1, 2})", "a set is no plain value", PLAIN),
        ("net.py:Net(a=[b'x'])", "a bytes is no plain value", PLAIN),
        ("net.py:Net(a={'b': 1+2j})", "a complex is no plain value", PLAIN),
        (f"net.py:Net(a={'9' * 5000})", "cannot be read", PLAIN),
        (f"net.py:Net(a={'[' * 5000})", "cannot be read", PLAIN),
        ("net.py:1x", "does not name Python code", "'path/to/file.py:callable'"),
        ("a b:Net", "does not name Python code", "'package.module:callable'"),
    ],
)
def test_no_model(text: str, said: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec_from_options(None, Typed(model=text))
    (problem,) = caught.value.problems
    assert said in problem.what
    assert fix in problem.fix
    assert problem.where in ("--model", "the command line.model.factory")


INPUTS: dict[str, dict[str, Any]] = {
    "2x3x224x224": {"shape": (2, 3, 224, 224)},
    "7": {"shape": (7,)},
    "2x16:int64:0..1000": {"shape": (2, 16), "dtype": "int64", "range": (0, 1000)},
    "2x16:int64": {"shape": (2, 16), "dtype": "int64"},
    "2x3:-1.5..1.5": {"shape": (2, 3), "range": (-1.5, 1.5)},
    "2x3:1e-3..1e3": {"shape": (2, 3), "range": (1e-3, 1e3)},
    "2x3:float16:0..1": {"shape": (2, 3), "dtype": "float16", "range": (0, 1)},
    "2x3:int8:-5..-1": {"shape": (2, 3), "dtype": "int8", "range": (-5, -1)},
    "mask=2x16:bool": {"shape": (2, 16), "dtype": "bool", "name": "mask"},
    "x=2x16:int64:0..9": {"shape": (2, 16), "dtype": "int64", "range": (0, 9), "name": "x"},
    "a.safetensors:images": {"file": "a.safetensors", "key": "images"},
    "sub/a.safetensors:x.0": {"file": "sub/a.safetensors", "key": "x.0"},
    "x=a.safetensors:images": {"file": "a.safetensors", "key": "images", "name": "x"},
    "a:b.safetensors:k:l": {"file": "a:b.safetensors", "key": "k:l"},
}


@pytest.mark.parametrize("text", INPUTS)
def test_an_input(text: str) -> None:
    (entry,) = spec_from_options(None, Typed(inputs=[text])).inputs
    assert isinstance(entry, InputSpec)
    assert entry.model_dump(exclude_defaults=True) == INPUTS[text]


DICTS: dict[str, dict[str, Any]] = {
    "image=1x3x8x8,mask=1x8x8:bool": {
        "image": {"shape": (1, 3, 8, 8)},
        "mask": {"shape": (1, 8, 8), "dtype": "bool"},
    },
    "ids=2x9:int64:0..9, mask=2x9": {
        "ids": {"shape": (2, 9), "dtype": "int64", "range": (0, 9)},
        "mask": {"shape": (2, 9)},
    },
    "image=1x3,": {"image": {"shape": (1, 3)}},
    "a=x.safetensors:k,l,shape=2": {"a": {"file": "x.safetensors", "key": "k,l"}, "shape": {"shape": (2,)}},
}


@pytest.mark.parametrize("text", DICTS)
def test_an_input_that_is_a_dict(text: str) -> None:
    (entry,) = spec_from_options(None, Typed(inputs=[text])).inputs
    assert isinstance(entry, dict)
    held = {name: item.model_dump(exclude_defaults=True) for name, item in entry.items()}  # type: ignore[union-attr]
    assert held == DICTS[text]


SHAPES = "write 2x3x224x224, 2x16:int64:0..1000, mask=2x16:bool or samples.safetensors:images"


@pytest.mark.parametrize(
    ("text", "said", "fix"),
    [
        ("", "describes no tensor", SHAPES),
        ("2*3", "describes no tensor", SHAPES),
        ("2X3", "describes no tensor", SHAPES),
        ("2,3", "describes no tensor", SHAPES),
        ("-1x3", "describes no tensor", SHAPES),
        ("2x", "describes no tensor", SHAPES),
        ("2x3:int64:9", "describes no tensor", SHAPES),
        ("2x3:0..", "describes no tensor", SHAPES),
        ("1a=2x3", "describes no tensor", SHAPES),
        ("9" * 5000, "describes no tensor", SHAPES),
        ("a.safetensors", "describes no tensor", SHAPES),
        ("a.pt:images", "describes no tensor", SHAPES),
        ("2x3:1-2..5", "has no range", "write low..high: 0..1000, -1.5..1.5"),
        ("0x3", "at least 1", ""),
        ("99999x99999", "more than 2**31", ""),
        ("a=2x3,a=2x3", "'a' is given twice", "image=1x3x8x8,mask=1x8x8:bool"),
        ("a=2x3,4x5", "describes no tensor", SHAPES),
        ("a=2x3,b=2*3", "describes no tensor", SHAPES),
        ("a=2x3:f32,b=1", "dtype 'f32' is unknown", "float32"),
        ("2x3:f32", "dtype 'f32' is unknown", "float32"),
        ("2x3:int64:5..1", "low < high", "[0, 1000]"),
        ("2x3:uint8:0..300", "does not fit uint8", "[0, 256)"),
        ("2x3:int64:0.5..1", "of whole numbers", ""),
        ("2x3:bool:0..1", "has no range", "remove range"),
        ("2x3:0..1e999", "finite number", ""),
    ],
)
def test_no_input(text: str, said: str, fix: str) -> None:
    with pytest.raises(UsageError) as caught:
        spec_from_options(None, Typed(inputs=["1x3", text]))
    (problem,) = caught.value.problems
    assert said in problem.what
    assert fix in problem.fix
    assert problem.where == "--input" or problem.where.startswith("the command line.inputs[1]")


def test_positional_inputs_come_first() -> None:
    with pytest.raises(UsageError, match="a positional input stands after a named one"):
        spec_from_options(None, Typed(inputs=["x=2x3", "2x3"]))


def test_nothing_typed_is_an_empty_spec() -> None:
    assert spec_from_options(None) == Spec()


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spec in another folder than the working folder, that says everything."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    path = Path("sub") / "fuse.yaml"
    content = {
        "version": 1,
        "model": {"factory": "net.py:build"},
        "inputs": [{"shape": [1, 3]}],
        "groups": [["conv", "bn"]],
        "exclude": ["head"],
        "target": "quant",
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_what_is_typed_takes_the_place_of_what_the_spec_says(written: Path) -> None:
    read = read_spec(written)
    typed: list[tuple[dict[str, Any], str]] = [
        ({"model": "pkg.mod:Net"}, "model"),
        ({"inputs": ["4x3"]}, "inputs"),
        ({"discover": True}, "discover"),
        ({"target": "inference"}, "target"),
        ({"exclude": ["tail"]}, "exclude"),
    ]
    for options, name in typed:
        spec = spec_from_options(written, Typed(**options))
        assert getattr(spec, name) != getattr(read, name)
        assert spec == read.model_copy(update={name: getattr(spec, name)})
        assert (spec.source, spec.sha256) == (written, read.sha256)


def test_typed_paths_start_in_the_working_folder(written: Path) -> None:
    """The spec's own start in its folder, and fusecli resolves all of them from there."""
    spec = spec_from_options(written, Typed(model="net.py:Net", inputs=["a.safetensors:x"]))
    here = Path.cwd()
    assert spec.model is not None
    assert spec.model.factory == f"{here / 'net.py'}:Net"
    (entry,) = spec.inputs
    assert isinstance(entry, InputSpec)
    assert entry.file == str(here / "a.safetensors")
