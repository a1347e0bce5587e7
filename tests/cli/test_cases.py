"""Cases of the command line that no package can have by itself: 38, 46, 55, 59 and 60."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fusecli
from fusecli.checkpoint import open_checkpoint
from fusecli.rewrite import MANIFEST_KEY
from tests.cli.conftest import PAIR
from tests.nets import images, randomise

BARE = ("fuse", "model.pt", "--spec", "fuse.yaml")
FUSE = (*BARE, "--allow-code", "net.py")
FUSED = Path("model.fused.safetensors")


def build(source: str) -> nn.Module:
    names = {"__name__": "net"}
    exec(source, names)
    model: nn.Module = names["build"]()
    return model


def original(source: str) -> nn.Module:
    model = build(source)
    model.load_state_dict(torch.load("model.pt", weights_only=True))
    return model.eval()


class TestCase38:
    """eps is not in a state dict and is never guessed."""

    def test_no_eps_is_an_error_that_says_how_to_give_it(self, cli, project):
        project(model=None, inputs=None)
        ended = cli(*BARE)
        assert (ended.code, ended.out) == (2, "")
        assert "fuse.yaml:1:" in ended.err
        assert "the eps of bn is not in a state dict, and it is never guessed" in ended.err
        for way in ("{modules: [...], eps: 1.0e-5}", "assume: {eps: 1.0e-5}", "model.factory"):
            assert way in ended.err
        assert not FUSED.exists()

    def test_every_group_that_lacks_it_is_named(self, cli, project):
        four = PAIR.replace(
            "bn=nn.BatchNorm2d(6)", "bn=nn.BatchNorm2d(6), c2=nn.Conv2d(6, 4, 1), b2=nn.BatchNorm2d(4)"
        )
        project(four, [["conv", "bn"], ["c2", "b2"]], model=None, inputs=None)
        assert cli(*BARE).err.count("never guessed") == 2

    @pytest.mark.parametrize("eps", [1e-5, 1e-3])
    def test_the_one_that_is_given_is_used(self, cli, project, eps):
        source = PAIR.replace("BatchNorm2d(6)", f"BatchNorm2d(6, eps={eps})")
        project(
            source, [{"modules": ["conv", "bn"], "eps": eps}], model=None, inputs=None, assume={"eps": 1.0}
        )
        report = cli(*BARE, "--report", "json=-").report
        assert report["status"] == "fused"
        assert report["groups"][0]["evidence"] == "claimed"
        assert not [entry for entry in report["ledger"] if "eps" in entry["what"]]  # said, so not assumed
        fused = fusecli.load_fused(build(source), FUSED)
        x = images(2, 3, 8, 8)
        torch.testing.assert_close(fused(x), original(source)(x))

    def test_what_is_assumed_is_said(self, cli, project):
        project(model=None, inputs=None, assume={"eps": 1e-3})
        report = cli(*BARE, "--report", "json=-").report
        assert {"kind": "assumed", "where": "bn", "what": "eps 0.001, as the spec assumes"} in report[
            "ledger"
        ]

    def test_a_wrong_eps_is_found_as_soon_as_the_model_is_run(self, cli, project):
        project(model=None, inputs=None, assume={"eps": 1e-3})
        assert cli(*BARE).code == 0
        project()
        ended = cli("verify", "model.pt", FUSED, "--spec", "fuse.yaml", "--allow-code", "net.py")
        assert ended.code == 1


TRANSPOSED = """
from collections import OrderedDict
from torch import nn

def build():
    up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
    return nn.Sequential(OrderedDict(up=up, bn=nn.BatchNorm2d(4)))
"""


class TestTransposedWithoutCode:
    """A state dict does not tell a transposed convolution, nor its groups."""

    def test_the_mapping_form_tells(self, cli, project):
        group = {"modules": ["up", "bn"], "kind": "conv_transpose2d", "groups": 2, "eps": 1e-5}
        project(TRANSPOSED, [group], model=None, inputs=None)
        assert cli(*BARE).code == 0
        fused = fusecli.load_fused(build(TRANSPOSED), FUSED)
        x = images(2, 6, 4, 4)
        torch.testing.assert_close(fused(x), original(TRANSPOSED)(x), rtol=1e-5, atol=1e-5)
        assert cli("verify", "model.pt", FUSED).code == 0  # the manifest remembers what was said

    def test_taken_for_a_plain_one_it_is_refused_with_the_remedy(self, cli, project):
        project(TRANSPOSED, [["up", "bn"]], model=None, inputs=None, assume={"eps": 1e-5})
        ended = cli(*BARE)
        assert ended.code == 4
        assert "kind: conv_transpose2d" in ended.out

    @pytest.mark.parametrize(
        ("wrong", "said"),
        [
            (
                {"kind": "conv_transpose1d"},
                "up cannot be a conv_transpose1d: its weight has shape [6, 2, 2, 2]",
            ),
            ({"kind": "conv_transpose2d", "groups": 5}, "up cannot have 5 groups"),
        ],
    )
    def test_what_cannot_be_is_an_error(self, cli, project, wrong, said):
        project(TRANSPOSED, [{"modules": ["up", "bn"], "eps": 1e-5, **wrong}], model=None, inputs=None)
        ended = cli(*BARE)
        assert ended.code == 2
        assert said in ended.err


def test_a_weight_of_no_known_layer_is_refused(cli, project):
    project(model=None, inputs=None, assume={"eps": 1e-5})
    state = torch.load("model.pt", weights_only=True)
    torch.save({**state, "conv.weight": torch.ones(6, 3, 1, 1, 1, 1)}, "model.pt")
    ended = cli(*BARE)
    assert (ended.code, ended.err) == (4, "")
    assert "no rule fuses Unknown -> BatchNorm3d" in ended.out


class TestCase46:
    """An inference-folded artifact says that it is one."""

    def test_the_manifest_says_folded(self, cli, project):
        project()
        assert cli(*FUSE).code == 0
        with open_checkpoint(FUSED) as artifact:
            assert json.loads(artifact.metadata[MANIFEST_KEY])["mode"] == "folded"

    def test_a_loaded_artifact_is_for_inference(self, cli, project):
        project()
        assert cli(*FUSE).code == 0
        fused = fusecli.load_fused(build(PAIR).train(), FUSED)
        assert not any(module.training for module in fused.modules())
        assert isinstance(fused.bn, nn.Identity)


TIED = """
from collections import OrderedDict
from torch import nn

def build():
    model = nn.Sequential(OrderedDict(
        conv=nn.Conv2d(3, 6, 3), bn=nn.BatchNorm2d(6),
        a=nn.Conv2d(6, 6, 1), b=nn.Conv2d(6, 6, 1, bias=False)))
    model.b.weight = model.a.weight
    return model
"""


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
class TestCase55:
    """Tensors that are not contiguous or tied are written right, and tied again when they are loaded."""

    def test_channels_last(self, cli, project, suffix):
        project()
        model = original(PAIR).to(memory_format=torch.channels_last)
        torch.save(model.state_dict(), "model.pt")
        assert not torch.load("model.pt", weights_only=True)["conv.weight"].is_contiguous()
        assert cli(*FUSE, "-o", f"out.{suffix}").code == 0
        fused = fusecli.load_fused(build(PAIR), f"out.{suffix}")
        x = images(2, 3, 8, 8)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-5)

    def test_ties_are_recorded_and_restored(self, cli, project, suffix):
        project(TIED)
        report = cli(*FUSE, "-o", f"out.{suffix}", "--report", "json=-").report
        assert report["status"] == "fused"
        assert [entry["where"] for entry in report["ledger"] if entry["kind"] == "tie"] == ["a.weight"]
        fused = fusecli.load_fused(build(TIED), f"out.{suffix}")
        assert fused.a.weight is fused.b.weight
        x = images(2, 3, 8, 8)
        torch.testing.assert_close(fused(x), original(TIED)(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("line", ["", "    model.a.weight.tolist()  # not on the meta device\n"])
    def test_a_tied_weight_is_not_folded(self, cli, project, suffix, line):
        source = TIED.replace("    return model", line + "    return model")
        project(source.replace("bias=False)))", "bias=False), n=nn.BatchNorm2d(6)))"), [["b", "n"]])
        ended = cli(*FUSE, "-o", f"out.{suffix}")
        assert ended.code == 4
        assert "tied-weights" in ended.out
        assert "untie it" in ended.out


ALIASED = (
    PAIR.replace("return nn.Sequential(", "model = nn.Sequential(")
    + """
    model.again = model.conv
    return model
"""
)
HOOKED = (
    PAIR.replace("return nn.Sequential(", "model = nn.Sequential(")
    + """
    model.conv.register_forward_hook(lambda *_: None)
    return model
"""
)


def test_case_14_an_alias_is_seen_before_any_tensor_is_read(cli, project):
    project(ALIASED)
    report = cli(*FUSE, "--report", "json=-").report
    assert (report["exit_code"], report["refused"][0]["code"]) == (4, "shared-module")


def test_hooks_of_the_factory_are_reported_as_lost(cli, project):
    project(HOOKED)
    report = cli(*FUSE, "--report", "json=-").report
    assert report["status"] == "fused"
    assert [entry["where"] for entry in report["ledger"] if entry["kind"] == "hook"] == ["conv"]
    assert cli(*FUSE, "--force", "--strict").code == 6


HOSTILE = ["[red]x[/red]", "e\x1b[31mvil", "::error::x", "a\r\n::error::b", "]]>", "\u202etxt", "|`<b>"]


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_case_59_hostile_names_are_text_everywhere(cli, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 6, 1))
    model.add_module("bn", nn.BatchNorm2d(6))
    torch.save(randomise(model, 0).state_dict(), "model.pt")
    group = {"modules": [name, "bn"], "eps": 1e-5}
    Path("fuse.yaml").write_text(json.dumps({"version": 1, "groups": [group]}))
    ended = cli(*BARE, "--report", "json=r.json", "--report", "md=r.md")
    assert (ended.code, ended.err) == (0, "")
    markdown, text = Path("r.md").read_text(), Path("r.json").read_text()
    assert json.loads(text)["groups"][0]["modules"] == [name, "bn"]  # exactly the name, for programs
    for shown in (ended.out, markdown, text):
        assert not set(shown) & {"\x1b", "\r", "\u202e"}
        assert not any(line.lstrip().startswith("::") for line in shown.splitlines())
    assert "<b>" not in markdown
    if name == "[red]x[/red]":
        assert name in ended.out  # no markup: shown, not obeyed
    # On the way to an error as well.
    Path("fuse.yaml").write_text(json.dumps({"version": 1, "groups": [["nothing", name]]}))
    ended = cli(*BARE, "--force")
    assert ended.code == 2
    assert not set(ended.err) & {"\x1b", "\r", "\u202e"}
    assert not any(line.lstrip().startswith("::") for line in ended.err.splitlines())


def test_case_60_the_unmodified_class_does_not_take_the_artifact(cli, project):
    project()
    ended = cli(*FUSE)
    assert "fusecli.load_fused, not load_state_dict" in " ".join(ended.out.split())
    model = build(PAIR)
    with open_checkpoint(FUSED) as artifact:
        state = {name: tensor.load().clone() for name, tensor in artifact.tensors.items()}
    with pytest.raises(RuntimeError, match=r"bn\.running_mean"):
        model.load_state_dict(state)
    x = images(2, 3, 8, 8)
    fused = fusecli.load_fused(model, FUSED)
    torch.testing.assert_close(fused(x), original(PAIR)(x), rtol=1e-5, atol=1e-5)
