"""A wrong fold never exits 0: four ways to get one, in each real network."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.real.conftest import NETWORKS

ONCE = ("--samples", "1", "--report", "json=-")
OUT = Path("out.safetensors")

# Another model than the true one: one of its norms divides by something else.
ALTERED = """
from fusecli.consent import Consent, load_object
from pathlib import Path

def build(factory, kwargs):
    here = Path(__file__).parent
    consent = Consent(packages={{factory.partition(".")[0]}}, files={{here / "networks.py"}})
    model = load_object(factory, consent, here)(**kwargs)
    model.get_submodule({norm!r}).eps *= 100
    return model
"""

# A fuser that folds the pair rightly and forgets the activation.
FORGETFUL = """
import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

def fuse(is_qat, layer, norm, activation):
    fold = fuse_linear_bn_eval if isinstance(layer, torch.nn.Linear) else fuse_conv_bn_eval
    return fold(layer, norm)
"""


def respec(folder: Path, net, **changes) -> None:
    """wrong.yaml: the network's own spec with the first two folds, and other values for some keys."""
    spec = net.read(folder)
    document = {
        "version": 1,
        "checkpoint": {"key": spec.checkpoint.key, "strip_prefix": list(spec.checkpoint.strip_prefix)},
        "model": {"factory": spec.model.factory, "kwargs": dict(spec.model.kwargs)},
        "inputs": [described(entry) for entry in spec.inputs],
        "groups": net.pairs,
        **changes,
    }
    document["checkpoint"] = {key: value for key, value in document["checkpoint"].items() if value}
    Path("wrong.yaml").write_text(
        json.dumps({key: value for key, value in document.items() if value is not None})
    )


def described(entry) -> object:
    if isinstance(entry, tuple):
        return [described(item) for item in entry]
    range_ = {"range": list(entry.range)} if entry.range else {}
    return {"shape": list(entry.shape), "dtype": entry.dtype, **range_}


@pytest.fixture(params=list(NETWORKS))
def net(request):
    return NETWORKS[request.param]


def test_the_right_folds_of_these_specs_exit_0(cli, models, network, net):
    respec(models, net)
    words = ("fuse", network(net.package, net.file), "--spec", "wrong.yaml", "--allow-code", net.code)
    ended = cli(*words, "-o", OUT, *ONCE)
    assert (ended.code, len(ended.report["groups"])) == (0, 2)


def producers(refusal, norm: str) -> list[str]:
    """The modules that the evidence names as what feeds `norm`."""
    seen = (
        re.fullmatch(rf"{re.escape(norm)} reads what comes from \S+ in (\S+)", line)
        for line in refusal["evidence"]
    )
    return [found[1] for found in seen if found]


def test_swapped_pairs(cli, models, network, net):
    (a, b), (c, d) = net.pairs
    respec(models, net, groups=[[a, d], [c, b]])
    words = ("fuse", network(net.package, net.file), "--spec", "wrong.yaml", "--allow-code", net.code)
    ended = cli(*words, "-o", OUT, *ONCE)
    assert (ended.code, ended.report["status"]) == (4, "refused")
    refused = {tuple(refusal["group"]): refusal for refusal in ended.report["refused"]}
    assert {no["code"] for no in refused.values()} == {"not-adjacent"}
    # The norm's real producer is the layer of its own pair.
    assert producers(refused[a, d], d) == [c]
    assert producers(refused[c, b], b) == [a]
    assert not OUT.exists()


def test_another_eps_in_the_model_that_was_fused(cli, models, network, net):
    # Of the second pair: behind deepCR's first layer the variance is a million, and no eps shows.
    model = net.read(models).model
    Path("altered.py").write_text(ALTERED.format(norm=net.pairs[1][1]))
    factory = {"factory": model.factory, "kwargs": dict(model.kwargs)}
    respec(models, net, model={"factory": "altered.py:build", "kwargs": factory})
    checkpoint = network(net.package, net.file)
    assert (
        cli("fuse", checkpoint, "--spec", "wrong.yaml", "--allow-code", "altered.py", "-o", OUT, *ONCE).code
        == 0
    )
    ended = cli("verify", checkpoint, OUT, "--spec", net.spec, "--allow-code", net.code, *ONCE)
    assert (ended.code, ended.report["status"]) == (1, "different")


def test_another_eps_claimed_without_the_model(cli, models, network, net):
    respec(models, net, model=None, inputs=None, assume={"eps": 1e-3})
    checkpoint = network(net.package, net.file)
    report = cli("fuse", checkpoint, "--spec", "wrong.yaml", "-o", OUT, *ONCE).report
    assert all(group["evidence"] == "claimed" for group in report["groups"])
    ended = cli("verify", checkpoint, OUT, "--spec", net.spec, "--allow-code", net.code, *ONCE)
    assert (ended.code, ended.report["status"]) == (1, "different")


def test_a_negated_gamma(cli, models, network, net):
    checkpoint = network(net.package, net.file)
    content = torch.load(checkpoint, weights_only=True, map_location="cpu")
    key = net.read(models).checkpoint.key
    state = content[key] if key else content
    (weight,) = (name for name in state if name.endswith(f"{net.pairs[0][1]}.weight"))
    with torch.no_grad():
        channel = state[weight].abs().argmax()
        state[weight][channel] *= -1
    torch.save(content, "tampered.pt")
    respec(models, net)
    assert (
        cli("fuse", "tampered.pt", "--spec", "wrong.yaml", "--allow-code", net.code, "-o", OUT, *ONCE).code
        == 0
    )
    for spec in ((), ("--spec", net.spec, "--allow-code", net.code)):
        ended = cli("verify", checkpoint, OUT, *spec, *ONCE)
        assert (ended.code, ended.report["status"]) == (1, "different")


@pytest.mark.parametrize("name", [name for name, net in NETWORKS.items() if net.activation])
def test_a_dropped_activation(cli, models, network, name):
    net = NETWORKS[name]
    members = [*net.pairs[0], net.activation]
    model = net.factory(models)()
    classes = [f"torch.nn.{type(model.get_submodule(path)).__name__}" for path in members]
    Path("forgetful.py").write_text(FORGETFUL)
    mapping = {"sequence": classes, "fuser": "forgetful.py:fuse"}
    respec(models, net, groups=[members], extra_mappings=[mapping])
    words = ("fuse", network(net.package, net.file), "--spec", "wrong.yaml", "--allow-code", net.code)
    ended = cli(*words, "--allow-code", "forgetful.py", "-o", OUT, *ONCE)
    assert (ended.code, ended.report["status"]) == (1, "different")
    assert not OUT.exists()


@pytest.mark.parametrize("name", [name for name, net in NETWORKS.items() if net.activation])
def test_a_dropped_activation_in_the_manifest(cli, models, network, name):
    """The tensors are right, but loading the artifact would take the activation out."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    net = NETWORKS[name]
    respec(models, net)
    checkpoint = network(net.package, net.file)
    words = (checkpoint, "--spec", "wrong.yaml", "--allow-code", net.code)
    assert cli("fuse", *words, "-o", OUT, *ONCE).code == 0
    with safe_open(OUT, framework="pt") as file:
        metadata = file.metadata()
    manifest = json.loads(metadata["fusecli"])
    like = next(edit for edit in manifest["edits"] if edit["edit"] == "identity")
    manifest["edits"].append({**like, "path": net.activation})
    save_file(load_file(OUT), "tampered.safetensors", {"fusecli": json.dumps(manifest)})
    for spec in ((), ("--spec", net.spec, "--allow-code", net.code)):
        ended = cli("verify", checkpoint, "tampered.safetensors", *spec, *ONCE)
        assert (ended.code, ended.report["status"]) == (1, "different")


@pytest.mark.parametrize("name", [name for name, net in NETWORKS.items() if net.activation])
def test_a_list_without_its_norm(cli, models, network, name):
    """[conv, relu], where a norm stands between them: nothing is absorbed across it."""
    net = NETWORKS[name]
    respec(models, net, groups=[[net.pairs[0][0], net.activation]])
    words = ("fuse", network(net.package, net.file), "--spec", "wrong.yaml", "--allow-code", net.code)
    ended = cli(*words, "-o", OUT, *ONCE)
    assert (ended.code, ended.report["status"]) == (4, "refused")
    assert ended.report["refused"][0]["code"] in ("not-adjacent", "no-rule")
    assert ended.report["verification"] is None
    assert not OUT.exists()
