"""What is blamed: the user's code, the inputs, the checkpoint or the artifact, whichever of them it is."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.cli.conftest import edit
from tests.nets import randomise

FUSE = ("fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py")
FUSED = Path("model.fused.safetensors")
VERIFY = ("verify", "model.pt", FUSED, "--spec", "fuse.yaml", "--allow-code", "net.py")
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), None
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        y = self.bn(self.conv(x))
        return y

build = Net
"""
LINE = 1 + NET.splitlines().index("        return y")


# --- forward


IN_THE_CODE = {
    "a name": ("return unknown(y)", "NameError: name 'unknown' is not defined"),
    "a local name": ("return z; z = y", "UnboundLocalError"),
    "an attribute": ("return self.norm(y)", "AttributeError: 'Net' object has no attribute 'norm'"),
    "an attribute of none": ("return self.pool.size", "AttributeError: 'NoneType' object has no attribute"),
    "what is not there": ("import nothing_at_all", "ModuleNotFoundError: No module named 'nothing_at_all'"),
    "a division": ("return y / (1 // 0)", "ZeroDivisionError"),
    "a file": ("return y, open('none.txt')", "FileNotFoundError"),
    "what is not written": ("raise NotImplementedError", "NotImplementedError"),
}


@pytest.mark.parametrize(("statement", "said"), IN_THE_CODE.values(), ids=IN_THE_CODE)
def test_a_mistake_in_forward_is_reported_at_its_line(cli, project, statement, said):
    folder = project(NET)
    edit(folder / "net.py", ("return y", statement))
    ended = cli(*FUSE)
    assert (ended.code, ended.out) == (2, "")
    assert f"error: net.py:{LINE}: the model's code raises {said}" in ended.err
    assert "in the model's code" in ended.err.partition("fix: ")[2]
    assert "per forward argument" not in ended.err


BOTH = {
    "none is called": ("return self.pool(y)", "TypeError: 'NoneType' object is not callable"),
    "a call of a layer": ("return self.head(y, y)", "TypeError"),
    "a key": ("return {}['mask']", "KeyError: 'mask'"),
    "a key of a tensor": ("return x['image']", ""),
    "an attribute of a tensor": ("return x.image", "AttributeError: 'Tensor' object has no attribute"),
}


@pytest.mark.parametrize(("statement", "said"), BOTH.values(), ids=BOTH)
def test_what_may_be_about_the_inputs_names_its_line_and_the_inputs(cli, project, statement, said):
    folder = project(NET)
    edit(folder / "net.py", ("return y", statement))
    ended = cli(*FUSE)
    assert (ended.code, ended.out) == (2, "")
    assert f"net.py:{LINE}" in ended.err
    assert said in ended.err
    assert "inputs" in ended.err


REFUSES = {
    "a check": ("assert x.shape[1] == 5, 'five channels'", "AssertionError: five channels"),
    "a raise": ("raise ValueError('at least 32 pixels')", "ValueError: at least 32 pixels"),
    "a type": ("raise TypeError('a dict is expected')", "TypeError: a dict is expected"),
}


@pytest.mark.parametrize(("statement", "said"), REFUSES.values(), ids=REFUSES)
def test_a_forward_that_refuses_its_inputs(cli, project, statement, said):
    folder = project(NET)
    edit(folder / "net.py", ("return y", statement))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert f"error: net.py:{LINE}: the model does not run on these inputs: {said}" in ended.err
    assert "this line refuses what it is given: give one entry per forward argument" in ended.err


UNFIT: dict[str, Any] = {
    "channels": [{"shape": [2, 5, 8, 8]}],
    "rank": [{"shape": [2, 3]}],
    "dtype": [{"shape": [2, 3, 8, 8], "dtype": "int64", "range": [0, 9]}],
    "too many": [{"shape": [2, 3, 8, 8]}, {"shape": [2]}],
    "another name": [{"shape": [2, 3, 8, 8], "name": "image"}],
    "a tuple": [[{"shape": [2, 3, 8, 8]}]],
}


@pytest.mark.parametrize("inputs", UNFIT.values(), ids=UNFIT)
def test_inputs_that_do_not_fit_are_still_the_inputs(cli, project, inputs):
    project(NET, inputs=inputs)
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "error: inputs: the model does not run on these inputs" in ended.err
    assert "fix: give one entry per forward argument" in ended.err


def test_sizes_that_do_not_fit_in_a_line_of_the_model_name_that_line_too(cli, project):
    folder = project(NET)
    edit(folder / "net.py", ("return y", "return x.flatten(1) @ torch.ones(7, 7)"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "error: inputs: the model does not run on these inputs: RuntimeError: mat1 and mat2" in ended.err
    assert f"(at net.py:{LINE})" in ended.err


def test_another_device_is_not_the_inputs(cli, project):
    if torch.cuda.is_available():
        pytest.skip("here it would run")
    folder = project(NET)
    edit(folder / "net.py", ("return y", "return y.cuda()"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert f"net.py:{LINE}: the model does not run on the CPU" in ended.err
    assert "let forward use the device of what it is given" in ended.err


def test_a_module_without_forward_is_not_the_inputs(cli, project):
    folder = project(NET)
    edit(folder / "net.py", ("def forward", "def forwards"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert 'missing the required "forward"' in ended.err
    assert "per forward argument" not in ended.err


def test_a_factory_that_raises_names_its_line(cli, project):
    folder = project(NET)
    edit(folder / "net.py", ("super().__init__()", "super().__init__(); self.width = widht"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "the factory net.py:build raised NameError: name 'widht' is not defined (at net.py:7)" in ended.err
    assert "fix: mend it there" in ended.err
    assert "kwargs" not in ended.err


def test_a_file_that_cannot_be_imported_names_its_line(cli, project):
    folder = project(NET)
    edit(folder / "net.py", ("build = Net", "build = Nett"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "importing it failed: NameError: name 'Nett' is not defined (at net.py:15)" in ended.err


# --- the tolerance that would accept


FUSER = """
def fuser(is_qat, conv, bn):
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    fused = fuse_conv_bn_eval(conv, bn)
    fused.weight.data *= 1 + FACTOR
    return fused
"""


def fused_by(project, factor: str) -> None:
    sequence = ["torch.nn.Conv2d", "torch.nn.BatchNorm2d"]
    project(
        NET + FUSER.replace("FACTOR", factor),
        extra_mappings=[{"sequence": sequence, "fuser": "net.py:fuser"}],
    )


def test_a_tolerance_that_would_accept_is_named(cli, project):
    """Two parts in 10^8: beyond what float64 folds differ by, and nothing that float32 would notice."""
    fused_by(project, "2e-8")
    ended = cli(*FUSE, "--report", "json=-")
    assert ended.code == 1
    verdict = ended.report["verification"]
    assert verdict["tolerance"] < verdict["smallest_tolerance"] < 1e-7
    assert "would accept it" in cli(*FUSE).out


@pytest.mark.parametrize("factor", ["float('nan')", "float('inf')", "9", "0.02"])
def test_no_tolerance_is_named_where_none_would_accept(cli, project, factor):
    """NaN and Inf are no errors of a size; a drift is too far, and weights off by 1 % would pass as well."""
    fused_by(project, factor)
    ended = cli(*FUSE, "--report", "json=-")
    assert ended.code == 1
    assert ended.report["verification"]["smallest_tolerance"] is None
    assert "would accept it" not in ended.err


def test_no_tolerance_accepts_stored_tensors_that_do_not_hold_the_fold(cli, project):
    project(NET)
    assert cli(*FUSE).code == 0
    tensors, metadata = opened(FUSED)
    tensors["conv.weight"][0, 0, 0, 0] += 1e-3
    save_file(tensors, FUSED, metadata)
    for words in (VERIFY, VERIFY[:3]):
        ended = cli(*words)
        assert ended.code == 1
        said = " ".join(ended.out.split())
        assert "stored tensors do not hold the fold: conv.weight" in said
        assert "would accept it" not in said


def test_no_tolerance_accepts_a_group_that_never_ran(cli, project):
    spare = NET.replace("None\n", "None; self.a, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)\n")
    project(spare, groups=[["conv", "bn"], ["a", "b"]])
    ended = cli(*FUSE)
    assert ended.code == 6
    assert "would accept it" not in ended.out


# --- checkpoint, artifact and code


def opened(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def with_manifest(**changes: Any) -> None:
    """Writes the artifact again, its manifest changed."""
    tensors, metadata = opened(FUSED)
    manifest = json.loads(metadata["fusecli"]) | changes
    save_file(tensors, FUSED, {"fusecli": json.dumps(manifest)})


@pytest.mark.parametrize("words", [VERIFY, VERIFY[:3]], ids=["with the model", "from the files alone"])
def test_an_artifact_that_names_another_input_is_proven_and_said(cli, project, words):
    project(NET)
    assert cli(*FUSE).code == 0
    with_manifest(input_sha256="a1" * 32)
    ended = cli(*words, "--report", "json=out.json", "--report", "md=out.md")
    assert ended.code == 0
    (entry,) = [
        entry for entry in json.loads(Path("out.json").read_text())["ledger"] if entry["kind"] == "input"
    ]
    assert entry["where"] == "model.pt"
    assert "made from another file, a1a1a1a1a1a1..., this one is " in entry["what"]
    for text in (ended.out, Path("out.md").read_text()):
        assert "made from another file" in " ".join(text.split())
    # Beside the verdict too: the ledger of a large model is pages above it.
    assert "made from another file" in " ".join(ended.out.split("verified, equivalent")[1].split())


def test_an_artifact_of_this_input_says_nothing_of_another(cli, project):
    project(NET)
    assert cli(*FUSE).code == 0
    ended = cli(*VERIFY)
    assert ended.code == 0
    assert "made from" not in " ".join(ended.out.split())


@pytest.mark.parametrize("field", ["input_sha256", "spec_sha256", "adapter_sha256"])
@pytest.mark.parametrize("digest", ["nonsense", "a" * 63, "A" * 64, 5, ["a" * 64]])
def test_a_hash_that_is_no_sha256_is_a_damaged_manifest(cli, project, field, digest):
    project(NET)
    assert cli(*FUSE).code == 0
    with_manifest(**{field: digest})
    for words in (VERIFY, ("inspect", FUSED), ("fuse", FUSED, "--spec", "fuse.yaml")):
        ended = cli(*words)
        assert ended.code == 3
        assert "the fusecli manifest inside is damaged" in ended.err
        assert "no sha256" in ended.err


CODE_CHANGED = {
    "another order": ("self.bn(self.conv(x))", "self.conv(self.bn(x[:, :3].repeat(1, 2, 1, 1))[:, :3])"),
    "something between": ("self.bn(self.conv(x))", "self.bn(self.conv(x).relu())"),
    "another reader": ("y = self.bn(self.conv(x))", "h = self.conv(x); y = self.bn(h) + h"),
    "another eps": ("nn.BatchNorm2d(6)", "nn.BatchNorm2d(6, eps=0.1)"),
    "another name": ("self.bn", "self.norm"),
    "another size": ("nn.Linear(6, 6)", "nn.Linear(6, 5)"),
}


def recoded(folder: Path, old: str, new: str) -> None:
    """The model's code in another version. A file of another name, since a process imports one once."""
    assert old in NET
    (folder / "later.py").write_text(NET.replace(old, new))
    edit(folder / "fuse.yaml", ("net.py:build", "later.py:build"))


@pytest.mark.parametrize("change", CODE_CHANGED.values(), ids=CODE_CHANGED)
def test_the_code_changed_since_it_was_fused(cli, project, change):
    folder = project(NET)
    assert cli(*FUSE).code == 0
    recoded(folder, *change)
    ended = cli(*VERIFY, "--allow-code", "later.py")
    assert ended.code in (1, 2)
    said = " ".join((ended.out + ended.err).split())
    assert "same checkpoint (its sha256 matches the manifest's)" in said
    assert "the model's code" in said or "its code differs" in said
    assert "not the one they came from" not in said
    assert "verify with the code and the arguments that it was fused with" in said


def test_another_checkpoint_is_said_first(cli, project):
    folder = project(NET)
    assert cli(*FUSE).code == 0
    content = torch.load("model.pt", weights_only=True)
    content["bn.running_var"][0] *= 2
    torch.save(content, "model.pt")
    ended = cli(*VERIFY)
    assert ended.code == 1
    verdict = " ".join(ended.out.split("different: not the same function")[1].split())
    assert verdict.index("this is not the checkpoint that the artifact was made from") < verdict.index(
        "because"
    )
    assert "give the checkpoint that the artifact was made from" in verdict
    assert "this is not the checkpoint" in cli(*VERIFY, "--quiet").err
    recoded(folder, "self.bn(self.conv(x))", "self.bn(self.conv(x).relu())")
    ended = cli(*VERIFY, "--allow-code", "later.py")
    assert ended.code == 1
    said = " ".join(ended.out.split())
    assert "this is not the checkpoint that the artifact was made from" in said
    assert "the model's code differs" not in said


def test_the_checkpoint_of_another_model_is_said_to_be_another(cli, project):
    project(NET)
    assert cli(*FUSE).code == 0
    torch.save({"other.weight": torch.ones(3)}, "model.pt")
    ended = cli(*VERIFY)
    assert ended.code == 2
    first, *_ = ended.err.splitlines()
    assert "this is not the checkpoint that the artifact was made from" in first
    assert "the model needs" in ended.err


# --- whole modules


@pytest.fixture
def whole(tmp_path, monkeypatch) -> Path:
    """whole.pt, a pickled module of the class net.Net, whose file is in the working folder and imports the
    one beside it; and packed.pt, of the class pack.models.Net in a package there."""
    monkeypatch.chdir(tmp_path)
    beside = "from torch import nn\n\nclass Norm(nn.BatchNorm2d):\n    pass\n"
    net = NET.replace("from torch import nn\n", "from torch import nn\nfrom beside import Norm\n")
    assert "beside" in net
    Path("beside.py").write_text(beside)
    Path("net.py").write_text(net)
    Path("pack").mkdir()
    Path("pack/__init__.py").write_text("")
    Path("pack/models.py").write_text(NET)
    with monkeypatch.context() as saving:
        saving.syspath_prepend(tmp_path)
        for name, file in (("net", "whole.pt"), ("pack.models", "packed.pt")):
            module = importlib.import_module(name)
            torch.save(randomise(module.Net(), 0), file)
        for name in ("net", "beside", "pack", "pack.models"):
            del sys.modules[name]
    return tmp_path


RUN = ("--discover", "--input", "2x3x8x8", "--allow-pickle", "--force")


@pytest.mark.parametrize(("file", "code"), [("whole.pt", "net.py"), ("packed.pt", "pack")])
def test_a_whole_module_whose_code_is_in_the_folder(cli, whole, file, code):
    path = [*sys.path]
    ended = cli("fuse", file, *RUN, "--allow-code", code)
    assert (ended.code, ended.err) == (0, "")
    fused = file.replace(".pt", ".fused.safetensors")
    spec = ("--allow-pickle", "--allow-code", code)
    assert cli("verify", file, fused, *spec).code == 0
    assert cli("plan", file, *RUN[1:3], *spec).code == 0
    assert "net" not in sys.modules
    assert sys.path[: len(path)] == path


def test_a_whole_module_finds_only_the_code_that_is_allowed(cli, whole):
    for words in ((), ("--allow-code", "beside.py"), ("--allow-code", "pack")):
        ended = cli("fuse", "whole.pt", *RUN, *words)
        assert ended.code == 3
        assert "the pickle needs the module 'net', which is not installed" in ended.err
        # The remedy as it is printed works, here where it is printed.
        assert "if the one in this folder is meant, add --allow-code net.py" in ended.err
    ended = cli("fuse", "packed.pt", *RUN, "--allow-code", "net.py")
    assert ended.code == 3
    assert "add --allow-code pack" in ended.err


def test_allowed_code_alone_loads_no_pickle(cli, whole):
    ended = cli("fuse", "whole.pt", *RUN[:3], "--allow-code", "net.py")
    assert ended.code == 3
    assert "holds a whole pickled module (class net.Net)" in ended.err


def test_code_of_a_whole_module_that_cannot_be_imported(cli, whole):
    edit(whole / "net.py", ("build = Net", "build = Nett"))
    ended = cli("fuse", "whole.pt", *RUN, "--allow-code", "net.py")
    assert ended.code == 2
    assert "importing it failed: NameError: name 'Nett' is not defined (at net.py:" in ended.err


# --- what is neither


METHODS = {
    "eval": "def eval(self): raise ValueError('mine')",
    "train": "def train(self, mode=True): raise ValueError('mine')",
    "names": "def named_modules(self, *_, **__): raise ValueError('mine')",
    "a dtype": "def double(self): raise ValueError('mine')",
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_method_of_the_model_that_raises_is_no_bug_of_fusecli(cli, project, method):
    folder = project(NET)
    edit(folder / "net.py", ("build = Net", f"class Other(Net):\n    {method}\nbuild = Other"))
    ended = cli(*FUSE, "--report", "json=-")
    assert ended.code == ended.report["exit_code"] == 2
    assert "error: net.py:16: the model's code raises ValueError: mine" in ended.err
    assert "the model's code raises" in ended.report["problems"][0]
    assert "bug" not in ended.err


def test_a_model_that_cannot_be_copied(cli, project):
    """Nothing is done to a model that may be the caller's own."""
    folder = project(NET)
    method = "def __deepcopy__(self, memo): raise ValueError('mine')"
    edit(folder / "net.py", ("build = Net", f"class Other(Net):\n    {method}\nbuild = Other"))
    ended = cli(*FUSE, "--report", "json=-")
    assert ended.code == ended.report["exit_code"] == 4
    assert "the model cannot be copied: ValueError: mine" in ended.err
    assert "__deepcopy__" in ended.err


def test_backward_inside_forward(cli, project):
    folder = project(NET)
    edit(folder / "net.py", ("return y", "y.sum().backward()"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert f"net.py:{LINE}: the model does not run without gradients" in ended.err
    assert "per forward argument" not in ended.err


def test_a_factory_that_puts_the_model_elsewhere(cli, project):
    if torch.cuda.is_available():
        pytest.skip("here it would be built")
    folder = project(NET)
    edit(folder / "net.py", ("build = Net", "build = lambda: Net().cuda()"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "(at net.py:15)" in ended.err
    assert "fusecli builds models on the CPU" in ended.err
    assert "kwargs" not in ended.err


def test_a_model_that_is_wrapped(cli, project):
    """As torch.compile does, or a class of one's own that holds the model."""
    folder = project(NET)
    body = "def __init__(self):\n        super().__init__()\n        self.inner = Net()"
    edit(folder / "net.py", ("build = Net", f"class Wrapped(nn.Module):\n    {body}\nbuild = Wrapped"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "the model's names begin with 'inner.', those of the file do not" in ended.err
    assert "let the factory return the model itself" in ended.err


def test_integers_where_a_parameter_is(cli, project):
    project(NET)
    content = torch.load("model.pt", weights_only=True)
    content["conv.weight"] = content["conv.weight"].to(torch.int8)
    torch.save(content, "model.pt")
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "model.pt: conv.weight is int8, and the model's parameter is not" in ended.err
    assert "give the float checkpoint" in ended.err


def test_a_loading_hook_that_raises(cli, project):
    folder = project(NET)
    method = "def _load_from_state_dict(self, *_): raise RuntimeError('mine')"
    edit(folder / "net.py", ("build = Net", f"class Other(Net):\n    {method}\nbuild = Other"))
    ended = cli(*FUSE)
    assert ended.code == 2
    assert "the model does not take its tensors: mine" in ended.err
    assert "fix: " in ended.err


def test_a_plan_for_what_is_folded_already(cli, project):
    project(NET)
    assert cli(*FUSE).code == 0
    ended = cli("plan", FUSED, *FUSE[2:])
    assert ended.code == 2
    assert "is an artifact of fusecli: its 1 groups are folded already" in ended.err
    assert "plan on the original checkpoint" in ended.err


def test_more_inputs_are_not_the_remedy_for_what_cannot_be_compared(cli, project):
    folder = project(NET)
    edit(folder / "net.py", ("return y", "return (lambda: y)"))
    ended = cli(*FUSE)
    assert ended.code == 6
    said = " ".join(ended.out.split())
    assert "output is a function, which cannot be compared" in said
    assert "give inputs that run every group" not in said
