"""`bake: true`: weights that are computed from other tensors become plain, and are folded like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fusecli
from fusecli import fuse, rules
from fusecli.errors import RefusedError, UsageError
from fusecli.graph.materialise import in_float64
from fusecli.rewrite import KeyMap, ModuleTree, Plain, Rewrite, apply_rewrite
from tests import nets
from tests.conftest import Cli

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm")

Layer = nn.Module


def squashed(layer: Layer) -> Layer:
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    return layer


def twice(layer: Layer) -> Layer:
    return prune.random_unstructured(prune.l1_unstructured(layer, "weight", 0.3), "weight", 0.3)


def of_both(layer: Layer) -> Layer:
    return parametrizations.weight_norm(prune.l1_unstructured(layer, "bias", 0.5))


COMPUTED: dict[str, Callable[[Layer], Layer]] = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "old weight_norm of another axis": lambda layer: nn.utils.weight_norm(layer, dim=1),
    "old weight_norm of the whole": lambda layer: nn.utils.weight_norm(layer, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "pruning, twice": twice,
    "a pruned bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.5),
    "orthogonal": parametrizations.orthogonal,
    "any": squashed,
    "weight and bias": of_both,
}
LAYERS: dict[str, tuple[Callable[[], Layer], Callable[[], Layer], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), lambda: nn.BatchNorm3d(6), (2, 4, 4, 4, 4)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), lambda: nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "linear": (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (5, 4)),
}


def network(
    layer: str, how: str, *, norm: bool = True, dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    """A network with a computed layer that has been trained a little, and inputs for it."""
    make, bn, shape = LAYERS[layer]
    modules = {"layer": make(), **({"bn": bn()} if norm else {})}
    net = nets.randomise(nets.chain(**modules), 0)
    net.layer = COMPUTED[how](net.layer)
    x = nets.images(*shape)
    net.train()
    with torch.no_grad():  # spectral norm takes its steps in training
        net(x), net(x)
    return net.to(dtype).eval(), x.to(dtype)


def computed(layer: Any) -> dict[str, torch.Tensor]:
    """Weight and bias in float64, as the layer itself computes them from its stored tensors."""
    wide = in_float64(layer)
    for hook in wide._forward_pre_hooks.values():
        hook(wide, ())
    return {"weight": wide.weight.detach(), "bias": wide.bias.detach()}


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("how", COMPUTED)
def test_it_takes_a_word_to_bake(how: str) -> None:
    net, x = network("conv2d", how)
    (refused,) = fuse(net, x, groups=["layer", "bn"]).refused
    assert refused.code == "parametrized"
    assert "`bake: true`" in refused.remedy
    assert fuse(net, x, discover=True).exit_code == 5


def test_a_plain_layer_by_itself_is_nothing_to_bake() -> None:
    outcome = fuse(nets.conv_bn(), nets.images(2, 3, 8, 8), groups=[["conv"]], bake=True)
    (refused,) = outcome.refused
    assert refused.code == "no-rule"


def test_a_computed_norm_by_itself_is_no_group() -> None:
    net = nets.conv_bn()
    parametrize.register_parametrization(net.bn, "weight", nn.Tanh())
    outcome = fuse(net, nets.images(2, 3, 8, 8), groups=[["bn"]], bake=True)
    assert [no.code for no in outcome.refused] == ["no-rule"]


def test_a_group_of_one_needs_the_word() -> None:
    net, x = network("conv2d", "pruning")
    with pytest.raises(UsageError, match="at least two names"):
        fuse(net, x, groups=[["layer"]])


def test_a_layer_of_two_names_is_refused() -> None:
    conv = parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    net = nn.Sequential(conv, nn.ReLU(), conv)
    outcome = fuse(net, nets.images(2, 3, 4, 4), groups=[["0"]], bake=True)
    assert [no.code for no in outcome.refused] == ["shared-module"]
    outcome = fuse(net, nets.images(2, 3, 4, 4), groups=[["0"]], bake=True, shared="clone")
    assert outcome.exit_code == 0
    assert outcome.model is not None
    assert [parametrize.is_parametrized(outcome.model[i]) for i in (0, 2)] == [False, True]


def test_a_weight_that_something_else_reads_stays() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = parametrizations.weight_norm(nn.Conv2d(3, 3, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) + self.conv.weight.sum()

    outcome = fuse(Reads(), nets.images(2, 3, 4, 4), groups=[["conv"]], bake=True)
    assert [no.code for no in outcome.refused] == ["shared-weight"]


def test_a_custom_fuser_is_given_no_computed_layer() -> None:
    net, x = network("conv2d", "old weight_norm")
    fuser = "torch.nn.utils.fusion:fuse_conv_bn_eval"
    mapping = {"sequence": ["torch.nn.Conv2d", "torch.nn.BatchNorm2d"], "fuser": fuser}
    spec = {"groups": [["layer", "bn"]], "bake": True, "extra_mappings": [mapping]}
    (refused,) = fuse(net, x, spec=spec, allow_code=["torch"]).refused
    assert (refused.code, "custom fuser" in refused.reason) == ("parametrized", True)


def test_fuse_modules_does_not_bake() -> None:
    net, _ = network("conv2d", "pruning")
    with pytest.raises(RefusedError, match="computed from other tensors"):
        fusecli.fuse_modules(net, ["layer", "bn"])


# ---------------------------------------------------------------------------------------------- the laws


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("layer", LAYERS)
def test_alone_the_weight_is_the_exact_one_rounded_once(layer: str, how: str) -> None:
    net, x = network(layer, how, norm=False)
    outcome = fuse(net, x, discover=True, bake=True)
    assert outcome.exit_code == 0
    assert [group.rule for group in outcome.groups] == ["bake"]
    fused = outcome.model
    assert fused is not None
    assert type(fused.layer) is type(LAYERS[layer][0]())
    expected = computed(net.layer)
    assert fused.state_dict().keys() == {"layer.weight", "layer.bias"}
    for name, exact in expected.items():
        # Nearest: no float32 is closer than half a unit in the last place.
        stored = getattr(fused.layer, name).detach().double()
        assert ((stored - exact).abs() <= exact.abs() * 2.0**-24 * (1 + 1e-6) + 1e-45).all()


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("layer", LAYERS)
def test_before_a_norm(layer: str, how: str) -> None:
    net, x = network(layer, how)
    outcome = fuse(net, x, groups=["layer", "bn"], bake=True)
    assert outcome.exit_code == 0, outcome.verification
    (group,) = outcome.groups
    assert group.rule.startswith("bake+")
    assert group.float64_error is not None
    assert group.float64_error < 1e-12
    fused = outcome.model
    assert fused is not None
    s = (net.bn.weight.double() / (net.bn.running_var.double() + net.bn.eps).sqrt()).detach()
    expected = computed(net.layer)
    axis = 1 if layer == "transposed" else 0
    exact = expected["weight"] * s.view([-1 if d == axis else 1 for d in range(expected["weight"].ndim)])
    stored = fused.layer.weight.detach().double()
    assert ((stored - exact).abs() <= exact.abs() * 2.0**-24 * (1 + 1e-6) + 1e-45).all()
    assert fusecli.verify(net, fused, x).judgement == "equivalent"


@pytest.mark.parametrize("how", [how for how in COMPUTED if how != "orthogonal"])
def test_bfloat16_is_rounded_once(how: str) -> None:
    """torch itself rounds at every step: then a product is up to a few units off."""
    net, x = network("conv2d", how, dtype=torch.bfloat16)
    outcome = fuse(net, x, groups=["layer", "bn"], bake=True)
    assert outcome.exit_code == 0, outcome.verification
    assert outcome.model is not None
    s = (net.bn.weight.double() / (net.bn.running_var.double() + net.bn.eps).sqrt()).detach()
    exact = computed(net.layer)["weight"] * s.view(-1, 1, 1, 1)
    stored = outcome.model.layer.weight.detach()
    assert stored.dtype is torch.bfloat16
    assert ((stored.double() - exact).abs() <= exact.abs() * 2.0**-8 * (1 + 1e-6)).all()


def test_the_model_is_left_as_it_was() -> None:
    for how in COMPUTED:
        net, x = network("conv2d", how)
        before, kind = {k: v.clone() for k, v in net.state_dict().items()}, type(net.layer)
        outcome = fuse(net.train(), x, groups=["layer", "bn"], bake=True)
        assert outcome.exit_code == 0
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        assert type(net.layer) is kind
        assert torch.isfinite(net.eval()(x)).all()  # a copy of a parametrized module shares its class


def test_only_what_is_needed_is_baked() -> None:
    net = nets.chain(
        a=nn.Conv2d(3, 4, 1),
        bn=nn.BatchNorm2d(4),
        act=nn.ReLU(),
        b=parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
    )
    net = nets.randomise(net, 0)
    net.a = parametrizations.spectral_norm(net.a)
    x = nets.images(2, 3, 4, 4)
    outcome = fuse(net, x, groups=["a", "bn"], bake=True)
    assert outcome.model is not None
    assert parametrize.is_parametrized(outcome.model.b)
    assert not parametrize.is_parametrized(outcome.model.a)
    outcome = fuse(net, x, groups=["a", "bn"], bake=True, discover=True)
    assert [(g.modules, g.rule) for g in outcome.groups] == [(("a", "bn"), "bake+conv_bn"), (("b",), "bake")]
    outcome = fuse(net, x, spec={"discover": True, "bake": True, "exclude": ["b"]})
    assert [g.modules for g in outcome.groups] == [("a", "bn")]


def test_a_group_that_only_moves_is_baked_too() -> None:
    net = nets.chain(conv=parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), relu=nn.ReLU())
    outcome = fuse(net, nets.images(2, 3, 4, 4), groups=["conv", "relu"], bake=True)
    assert outcome.exit_code == 0
    assert outcome.model is not None
    assert outcome.model.state_dict().keys() == {"conv.0.weight", "conv.0.bias"}


def test_a_computed_norm() -> None:
    net = nets.conv_bn()
    parametrize.register_parametrization(net.bn, "weight", nn.Tanh())
    outcome = fuse(net, nets.images(2, 3, 8, 8), groups=["conv", "bn"], bake=True)
    assert outcome.exit_code == 0
    assert outcome.model is not None
    assert isinstance(outcome.model.bn, nn.Identity)


def test_a_layer_that_never_ran_stays_as_it_is() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = parametrizations.weight_norm(nn.Linear(4, 4))
            self.spare = parametrizations.weight_norm(nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    outcome = fuse(Spare(), torch.randn(3, 4), discover=True, bake=True)
    assert [group.modules for group in outcome.groups] == [("used",)]
    assert outcome.exit_code == 0


def test_two_layers_that_compute_their_weights_from_one_tensor() -> None:
    """Each has a weight of its own once it is plain."""
    first, second = (nets.randomise(nn.Conv2d(3, 3, 1), 0) for _ in range(2))
    for layer in (first, second):
        nn.utils.weight_norm(layer)
    second.weight_v = first.weight_v
    net = nets.randomise(
        nets.chain(a=nn.Identity(), n=nn.BatchNorm2d(3), r=nn.ReLU(), b=nn.Identity(), m=nn.BatchNorm2d(3)), 0
    )
    net.a, net.b = first, second
    x = nets.images(2, 3, 4, 4)
    outcome = fuse(net, x, discover=True, bake=True)
    assert [group.modules for group in outcome.groups] == [("a", "n"), ("b", "m")]
    assert outcome.exit_code == 0


def test_plan_says_what_it_would_bake() -> None:
    net, x = network("conv2d", "spectral_norm")
    assert fusecli.plan(net, x).groups == ()
    assert fusecli.plan(net, x, bake=True).groups == (("layer", "bn"),)


# ------------------------------------------------------------------------------------- the edit by itself


def test_what_the_edit_does_to_keys() -> None:
    keymap = KeyMap([Plain("a.conv")])
    gone = ("weight_g", "weight_v", "weight_orig", "weight_mask", "weight_u", "bias_orig", "bias_mask")
    for name in (*gone, "parametrizations.weight.original0", "parametrizations.weight.0._u", "lora_A"):
        assert keymap(f"a.conv.{name}") is None
    for key in ("a.conv.weight", "a.conv.bias", "a.convs.weight_g", "a.weight_g", "a.conv.weight_extra"):
        assert keymap(key) == key


def test_the_edit_does_nothing_to_a_plain_layer() -> None:
    net = nets.conv_bn()
    before = net.conv.weight
    apply_rewrite(ModuleTree(net), Rewrite(edits=(Plain("conv"),)))
    assert net.conv.weight is before


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_edit_leaves_a_layer_as_it_was_built(how: str, device: str) -> None:
    net, x = network("conv2d", how)
    expected = net(x)
    copy = net.to(device)
    apply_rewrite(ModuleTree(copy), Rewrite(edits=(Plain("layer"),)))
    assert type(copy.layer) is nn.Conv2d
    assert not copy.layer._forward_pre_hooks
    assert not copy.layer._state_dict_hooks
    assert copy.layer.state_dict().keys() == {"weight", "bias"}
    assert all(parameter.requires_grad for parameter in copy.layer.parameters())
    assert copy.layer.weight.shape == (6, 2, 3, 3)
    if device == "cpu":
        assert torch.allclose(copy(x), expected, atol=1e-5)


# --------------------------------------------------------------------------------------------- with files

NET = """
import warnings
from collections import OrderedDict
from torch import nn
from torch.nn.utils import parametrizations, prune

def build():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = dict(
            a=nn.utils.weight_norm(nn.Conv2d(3, 4, 3)), bn=nn.BatchNorm2d(4), act0=nn.ReLU(),
            b=parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), act=nn.ReLU(),
            c=prune.identity(nn.Conv2d(4, 4, 1), "weight"), bn2=nn.BatchNorm2d(4), act1=nn.ReLU(),
            d=nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)), act2=nn.ReLU(),
            e=parametrizations.weight_norm(nn.Conv2d(4, 2, 1)))
    return nn.Sequential(OrderedDict(layers))
"""
SPEC = """
version: 1
model: {factory: "net.py:build"}
inputs: [{shape: [2, 3, 6, 6]}]
"""
FUSED = "model.fused.safetensors"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(NET, names)
    net = nets.randomise(names["build"](), 0)
    net.c.weight_mask.copy_((torch.arange(16).view(4, 4, 1, 1) % 3 > 0).float())
    net.train()
    with torch.no_grad():
        net(nets.images(2, 3, 6, 6))
    net.eval()
    torch.save(net.state_dict(), "model.pt")
    Path("net.py").write_text(NET)
    Path("fuse.yaml").write_text(f"{SPEC}bake: true\ndiscover: true\n")
    return net


ALLOW = ("--allow-code", "net.py")


def test_the_file_holds_plain_weights(cli: Cli, files: Any) -> None:
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW, "--report", "json=-")
    assert ended.code == 0, ended.err
    report = ended.report
    assert {tuple(g["modules"]): g["rule"] for g in report["groups"]} == {
        ("a", "bn"): "bake+conv_bn",
        ("b",): "bake",
        ("c", "bn2"): "bake+conv_bn",
        ("d",): "bake",
        ("e",): "bake",
    }
    assert {g["evidence"] for g in report["groups"]} == {"observed"}
    assert load_file(FUSED).keys() == {f"{n}.{t}" for n in "abcde" for t in ("weight", "bias")}
    names: dict[str, Any] = {}
    exec(NET, names)
    x = nets.images(2, 3, 6, 6)
    for device in ("cpu", "meta"):
        with torch.device(device):
            fused = fusecli.load_fused(names["build"](), FUSED)
        assert torch.allclose(fused(x), files(x), atol=1e-4)
        assert {type(fused.get_submodule(name)) for name in "abcde"} == {nn.Conv2d}
    exact = computed(files.b)["weight"]
    assert torch.equal(load_file(FUSED)["b.weight"], exact.float())
    assert cli("verify", "model.pt", FUSED, "--spec", "fuse.yaml", *ALLOW).code == 0


def test_a_wrong_bake_in_the_file_is_found(cli: Cli, files: Any) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    assert cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW).code == 0
    with safe_open(FUSED, "pt") as file:
        metadata = file.metadata()
    state = load_file(FUSED)
    state["b.weight"].view(-1)[0] *= 1 + 2.0**-20
    save_file(state, FUSED, metadata)
    ended = cli("verify", "model.pt", FUSED, "--spec", "fuse.yaml", *ALLOW, "--report", "json=-")
    assert (ended.code, ended.report["verification"]["judgement"]) == (1, "different")


@pytest.mark.parametrize("wrong", ["weight_v as it stands", "rounded twice", "a power iteration"])
def test_a_wrong_rule_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof compares with the model that still computes its weights."""
    from fusecli.rules._member import Member

    net, x = network("conv2d", "spectral_norm" if "power" in wrong else "old weight_norm")
    right = Member.materialised.fget  # type: ignore[attr-defined]  # a property

    def mutated(self: Member) -> dict[str, torch.Tensor]:
        if "power" in wrong:
            self.module.train()
            self.module.weight  # noqa: B018  (it takes its step when it is asked for)
            self.module.eval()
        tensors: dict[str, torch.Tensor] = dict(right(self))
        if "weight_v" in wrong:
            tensors["layer.weight"] = self.module.weight_v.detach()
        if "twice" in wrong:
            # By numpy: around a parametrization torch's own narrowing is turned off.
            tensors = {k: torch.from_numpy(t.numpy().astype("f4").astype("f8")) for k, t in tensors.items()}
        return tensors

    monkeypatch.setattr(Member, "materialised", property(mutated))
    outcome = fuse(net, x, groups=["layer", "bn"], bake=True)
    assert outcome.exit_code == 1
    assert outcome.model is None


def test_plan_writes_a_spec_that_bakes(cli: Cli, files: Any) -> None:
    words = ("--spec", "fuse.yaml", *ALLOW)
    ended = cli("plan", "model.pt", *words, "-o", "found.yaml")
    assert ended.code == 0, ended.err
    text = Path("found.yaml").read_text()
    assert "bake: true" in text
    assert "  - [b]\n" in text
    assert cli("fuse", "model.pt", "--spec", "found.yaml", *ALLOW, "-o", "b.safetensors").code == 0
    assert cli("fuse", "model.pt", *words, "-o", "a.safetensors").code == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_the_command_line_says_it_too(cli: Cli, files: Any) -> None:
    model = ("--model", "net.py:build", "--input", "2x3x6x6", "--discover")
    assert cli("fuse", "model.pt", *model).code == 5
    ended = cli("fuse", "model.pt", *model, "--bake", "--report", "json=-")
    assert (ended.code, len(ended.report["groups"])) == (0, 5)
    ended = cli("verify", "model.pt", FUSED, *model[:-1], "--report", "json=-")
    assert (ended.code, len(ended.report["groups"])) == (0, 5)
    out = cli("plan", "model.pt", *model[:-1], "--bake").out
    assert "  - [a, bn]" in out


def test_the_rule_is_listed() -> None:
    assert "bake" in rules.names()
    assert "bake: true" in rules.describe("bake")


class Mixing(nn.Module):
    """Keeps a tensor that no state dict and no `double()` knows of."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [torch.eye(4) + 0.1]

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.kept[0] @ weight


class Numbers(nn.Module):
    """Asks for a number, which there is none of on the meta device."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * (2.0 if float(weight.detach().sum()) > 1e9 else 0.5)


class Raises(nn.Module):
    """Computes a weight as often as it is told to."""

    left = 100

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.dtype is torch.float64:
            raise RuntimeError("not in float64")
        return weight


@pytest.mark.parametrize("code", [Mixing, Numbers])
def test_somebodys_own_parametrization(code: type[nn.Module]) -> None:
    net = nets.chain(layer=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    parametrize.register_parametrization(net.layer, "weight", code())
    outcome = fuse(net, torch.randn(3, 4), groups=["layer", "bn"], bake=True)
    assert outcome.exit_code == 0, (outcome.refused, outcome.verification)


def test_one_that_has_no_float64_is_refused() -> None:
    net = nets.chain(layer=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    parametrize.register_parametrization(net.layer, "weight", Raises())
    (refused,) = fuse(net, torch.randn(3, 4), groups=["layer", "bn"], bake=True).refused
    assert (refused.code, "not in float64" in refused.reason) == ("parametrized", True)


OWN = """
import torch
from torch import nn
from torch.nn.utils import parametrize

class Own(nn.Module):
    def forward(self, weight):
        return weight * (2.0 if float(weight.detach().sum()) > 1e9 else 0.5)

def build():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    parametrize.register_parametrization(net[0], "weight", Own(), unsafe=True)
    return net
"""


def test_one_that_asks_for_numbers_in_a_file(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(OWN, names)
    torch.save(nets.randomise(names["build"](), 0).state_dict(), "model.pt")
    Path("net.py").write_text(OWN)
    spec = 'version: 1\nmodel: {factory: "net.py:build"}\ninputs: [{shape: [3, 4]}]\n'
    Path("fuse.yaml").write_text(spec + "bake: true\ngroups: [['0', '1']]\n")
    ended = cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW)
    assert ended.code == 0, ended.err


def test_without_the_models_code_nothing_is_baked(cli: Cli, files: Any) -> None:
    Path("bare.yaml").write_text("version: 1\nbake: true\ngroups: [[a, bn]]\n")
    ended = cli("fuse", "model.pt", "--spec", "bare.yaml")
    assert (ended.code, "the model's code computes its weights" in " ".join(ended.err.split())) == (2, True)
    assert cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW).code == 0
    ended = cli("verify", "model.pt", FUSED)
    assert (ended.code, "without the model's code" in " ".join(ended.err.split())) == (2, True)


def test_a_manifest_that_bakes_what_is_not_there(cli: Cli, files: Any) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    assert cli("fuse", "model.pt", "--spec", "fuse.yaml", *ALLOW).code == 0
    with safe_open(FUSED, "pt") as file:
        metadata = file.metadata()
    names: dict[str, Any] = {}
    exec(NET, names)
    for old, new in (
        ('"path":"b"', '"path":"nowhere"'),
        ('"path":"b"', '"path":""'),
        ('"path":"b"', '"path":7'),
    ):
        text = metadata["fusecli"]
        assert old in text
        save_file(load_file(FUSED), "wrong.safetensors", {"fusecli": text.replace(old, new)})
        with pytest.raises(fusecli.errors.FusecliError):
            fusecli.load_fused(names["build"](), "wrong.safetensors")


class ReadsItsMask(nn.Module):
    """Forward reads what the pruning of one of two layers has left."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.b, self.m = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        for layer in (self.a, self.b):
            prune.l1_unstructured(layer, "weight", 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.m(self.b(torch.relu(self.n(self.a(x))))) * self.b.weight_mask.mean()
        return y


def test_a_mask_that_forward_reads_keeps_that_layer_alone() -> None:
    model, x = nets.randomise(ReadsItsMask(), 0).eval(), torch.randn(2, 3, 9, 9)
    outcome = fusecli.fuse(model, x, discover=True, bake=True)
    assert outcome.status == "fused"
    assert [group.modules for group in outcome.groups] == [("a", "n")]
    (left,) = outcome.unfused
    assert (left.module, left.code) == ("m", "parametrized")
    assert "forward reads those too" in left.reason
    assert any("b made plain" in seen and "weight_mask" in seen for seen in left.evidence)
    assert "bake" not in left.remedy.replace("`bake: true` makes the other layers plain", "")
    with torch.no_grad():
        assert torch.allclose(outcome.model(x), model(x), atol=1e-4)
    asked = fusecli.fuse(model, x, groups=[["a", "n"], ["b", "m"]], bake=True)
    (no,) = asked.refused
    assert (no.group, no.code) == (("b", "m"), "parametrized")
    assert "forward reads those too" in no.reason


def test_a_model_that_does_not_run_is_told_as_before() -> None:
    model = ReadsItsMask().eval()
    with pytest.raises(fusecli.errors.UsageError, match="does not run on these inputs"):
        fusecli.fuse(model, torch.randn(2, 4, 9, 9), discover=True, bake=True)
