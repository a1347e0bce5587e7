"""`adapter`: a low-rank adapter is added to the weights, rounded once, and proven against the two apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import fusecli
from fusecli import fuse, rules
from fusecli.errors import RefusedError, UsageError
from fusecli.nn import Adapted, adapt
from fusecli.rewrite import ModuleTree, Plain, Rewrite, apply_rewrite
from tests import nets
from tests.conftest import Cli, Run

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4)
        self.ln = nn.LayerNorm(4)
        self.q, self.k = nn.Linear(4, 5), nn.Linear(4, 5, bias=False)
        self.out = nn.Linear(5, 3)
        self.tied = nn.Linear(5, 3, bias=False)
        self.tied.weight = self.out.weight
        self.deep = nn.Conv2d(2, 2, 1, groups=2)
        self.up = nn.ConvTranspose2d(2, 2, 1)
        self.table = nn.Embedding(4, 2)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, x):
        x = self.up(self.deep(x + self.table.weight.sum()))
        h = torch.relu(self.bn(self.conv(x))).flatten(2).transpose(1, 2)
        h = self.ln(self.normed(h))
        h = torch.tanh(self.q(h)) * self.k(h)
        return self.out(torch.relu(h)) + self.tied(h)
"""
SPEC: dict[str, Any] = {
    "version": 1,
    "model": {"factory": "net.py:Net"},
    "inputs": [{"shape": [2, 2, 6, 6]}],
    "verify": {"samples": 1},
}
FUSED = "base.fused.safetensors"
ALLOW = ("--allow-code", "net.py")
Tensors = Mapping[str, Tensor]


def pair(path: str, down: tuple[int, ...], up: tuple[int, ...], seed: int = 1) -> dict[str, Tensor]:
    """An adapter of one layer, under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"base_model.model.{path}.lora_A.weight": torch.randn(down, generator=generator),
        f"base_model.model.{path}.lora_B.weight": torch.randn(up, generator=generator),
    }


Q = pair("q", (2, 4), (5, 2))
CONV = pair("conv", (3, 2, 3, 3), (4, 3, 1, 1), 2)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The working folder, with net.py and base.safetensors; the value is the model."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(NET, names)
    net = nets.randomise(names["Net"](), 0).eval()
    save_file({k: v.clone() for k, v in net.state_dict().items()}, "base.safetensors")
    Path("net.py").write_text(NET)
    return net


def run(cli: Cli, tensors: Tensors | None, command: str = "fuse", **keys: Any) -> Run:
    """`fusecli fuse` (or verify) with this adapter, scale 2 if nothing else is said."""
    if tensors is not None:
        save_file(dict(tensors), "adapter.safetensors")
    adapter = {"file": "adapter.safetensors", "scale": 2.0}
    Path("fuse.yaml").write_text(json.dumps({**SPEC, "adapter": adapter, **keys}))
    files = ("base.safetensors", *((FUSED,) if command == "verify" else ("--force",)))
    return cli(command, *files, "--spec", "fuse.yaml", *ALLOW, "--report", "json=-")


def problems(ended: Run) -> str:
    return " ".join(ended.err.split())


# ---------------------------------------------------------------------------------------------- refusals

BAD: dict[str, tuple[dict[str, Tensor], int, str]] = {
    "an unknown layer": (
        pair("qq", (2, 4), (5, 2)),
        2,
        "the adapter has qq, which the model has not fix: the nearest is q",
    ),
    "one half": ({k: v for k, v in Q.items() if "lora_A" in k}, 2, "q has lora_A and no lora_B"),
    "A that does not fit": (pair("q", (2, 3), (5, 2)), 2, "q: lora_A is [2, 3] fix: the weight is [5, 4]"),
    "B that does not fit": (pair("q", (2, 4), (4, 2)), 2, "q: lora_B is [4, 2]"),
    "ranks that differ": (pair("q", (2, 4), (5, 3)), 2, "B has to be [5, 2]"),
    "rank 0": (pair("q", (0, 4), (5, 0)), 2, "lora_A is [0, 4]"),
    "a linear pair for a convolution": (pair("conv", (2, 18), (4, 2)), 2, "lora_A is [2, 18]"),
    "whole numbers": ({k: v.long() for k, v in Q.items()}, 2, "int64, not a floating-point tensor"),
    "nothing": ({}, 2, "there is no tensor in this adapter"),
    "another tensor": ({**Q, "base_model.model.q.weight": torch.ones(1)}, 2, "is no part of a LoRA adapter"),
    "two adapters": (
        {**Q, "base_model.model.q.lora_A.other.weight": torch.ones(2, 4)},
        2,
        "q has two tensors lora_A",
    ),
    "halves of two": (
        {"q.lora_A.foo.weight": torch.ones(1, 4), "q.lora_B.bar.weight": torch.ones(5, 1)},
        2,
        "several adapters: bar, foo",
    ),
    "DoRA": ({**Q, "base_model.model.q.lora_magnitude_vector": torch.ones(5)}, 4, "DoRA scales the sum"),
    "an embedding": (
        {"base_model.model.table.lora_embedding_A": torch.ones(1, 4)},
        4,
        "it adapts an embedding",
    ),
    "a saved module": (
        {**Q, "base_model.model.out.modules_to_save.weight": torch.ones(3, 5)},
        4,
        "it replaces whole modules",
    ),
    "a grouped convolution": (pair("deep", (1, 1, 1, 1), (2, 1, 1, 1)), 4, "it is a convolution of 2 groups"),
    "a transposed convolution": (pair("up", (1, 2, 1, 1), (2, 1, 1, 1)), 4, "it is of class ConvTranspose2d"),
    "a table": (pair("table", (1, 2), (4, 1)), 4, "it is of class Embedding"),
    "a norm": (pair("ln", (1, 4), (4, 1)), 4, "it is of class LayerNorm"),
    "a computed weight": (pair("normed", (1, 4), (4, 1)), 4, "computed from other tensors by parametrize"),
}


@pytest.mark.parametrize("what", BAD)
def test_an_adapter_that_is_none(cli: Cli, folder: Any, what: str) -> None:
    tensors, code, message = BAD[what]
    ended = run(cli, tensors)
    assert (ended.code, message in problems(ended)) == (code, True), ended.err
    assert not Path(FUSED).exists()


CONFIGS: dict[str, tuple[object, int, str]] = {
    "none": (None, 2, "nothing says its scale: adapter_config.json beside it"),
    "no JSON": ("{", 2, "is no JSON"),
    "a list": ([1], 2, "is no JSON object"),
    "deep": ("[" * 100_000, 2, "is no JSON"),
    "large": (" " * (1 << 20) + "{}", 2, "is larger than 1 MiB"),
    "no alpha": ({"r": 2}, 2, "lora_alpha is None"),
    "NaN": ('{"r": 2, "lora_alpha": NaN}', 2, "lora_alpha is nan"),
    "larger than any float": (f'{{"r": 2, "lora_alpha": 1{"0" * 400}}}', 2, "not a number"),
    "alpha as text": ({"r": 2, "lora_alpha": "16"}, 2, "lora_alpha is '16'"),
    "alpha as a truth": ({"r": 2, "lora_alpha": True}, 2, "lora_alpha is True"),
    "r as a truth": ({"r": True, "lora_alpha": 4}, 2, "r is True"),
    "r is none": ({"r": 0, "lora_alpha": 4}, 2, "r is 0"),
    "use_rslora as text": ({"r": 2, "lora_alpha": 4, "use_rslora": "no"}, 2, "use_rslora is 'no'"),
    "another rank": ({"r": 3, "lora_alpha": 4}, 2, "its rank is 2, and adapter_config.json says 3"),
    "DoRA": ({"r": 2, "lora_alpha": 4, "use_dora": True}, 4, "use_dora is True: DoRA"),
    "stored the other way round": ({"r": 2, "lora_alpha": 4, "fan_in_fan_out": True}, 4, "[in, out]"),
    "saved modules": ({"r": 2, "lora_alpha": 4, "modules_to_save": ["out"]}, 4, "replaces whole modules"),
    "alphas": ({"r": 2, "lora_alpha": 4, "alpha_pattern": {"q": 8}}, 4, "an alpha of its own"),
    "another kind": ({"r": 2, "lora_alpha": 4, "peft_type": "LOHA"}, 4, "peft_type is 'LOHA'"),
    "a changed base": ({"r": 2, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}, 4, "was changed too"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_a_configuration_that_says_no_scale(cli: Cli, folder: Any, what: str) -> None:
    content, code, message = CONFIGS[what]
    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        Path("adapter_config.json").write_text(text)
    ended = run(cli, Q, adapter={"file": "adapter.safetensors"})
    assert (ended.code, message in problems(ended)) == (code, True), ended.err


# What PEFT 0.19 writes for an adapter with all its defaults.
WRITTEN: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": {"base_model_class": "Net", "parent_library": "net"},
    "base_model_name_or_path": "somebody/net",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 6,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.19.1",
    "qalora_group_size": 16,
    "r": 2,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["q"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}
# Of each of these the adapter is something else than W + scale B A on the stored base.
SOMETHING_ELSE: list[tuple[str, Any]] = [
    ("alora_invocation_tokens", [1, 2]),
    ("arrow_config", {"top_k": 3}),
    ("bias", "all"),
    ("bias", "lora_only"),
    ("corda_config", {"corda_method": "ipm"}),
    ("eva_config", {"rho": 2.0}),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "eva"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "lora_ga"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "of next year"),
    ("layer_replication", [[0, 4]]),
    ("lora_ga_config", {"direction": "ArB2r"}),
    ("megatron_config", {"hidden_size": 8}),
    ("target_parameters", ["experts.gate_up_proj"]),
    ("trainable_token_indices", [0]),
    ("use_qalora", True),
    ("use_dora", 1),
    ("a_key_of_next_year", True),
    ("a_key_of_next_year", 0.5),
    ("a_key_of_next_year", 0),
]


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize(("key", "value"), SOMETHING_ELSE, ids=str)
def test_what_is_not_known_to_be_harmless_is_refused_by_name(
    cli: Cli, folder: Any, key: str, value: Any, scale: float | None
) -> None:
    """A scale of the spec's own does not make it W + scale B A."""
    Path("adapter_config.json").write_text(json.dumps({**WRITTEN, key: value}))
    adapter = (
        {"file": "adapter.safetensors"} if scale is None else {"file": "adapter.safetensors", "scale": scale}
    )
    ended = run(cli, Q, adapter=adapter)
    assert (ended.code, f"{key} is {value!r}:" in problems(ended)) == (4, True), ended.err
    assert not Path(FUSED).exists()


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"a_key_of_next_year": None, "another_one": False, "a_table": {}},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers", "lora_dropout": 0.5},
    ],
    ids=str,
)
def test_a_configuration_as_it_is_written(cli: Cli, folder: Any, more: dict[str, Any]) -> None:
    assert scale_of(cli, {**WRITTEN, **more}) == pytest.approx(3)
    assert scale_of(cli, {**WRITTEN, **more}, scale=-1) == pytest.approx(-1)


def test_a_file_that_is_not_there_or_runs_code(cli: Cli, folder: Any) -> None:
    ended = run(cli, None)
    assert (ended.code, "the adapter" in problems(ended)) == (2, True)
    torch.save(nn.Linear(2, 2), "adapter.safetensors")
    assert run(cli, None).code == 3


def test_a_tied_weight_is_refused(cli: Cli, folder: Any) -> None:
    out = pair("out", (2, 5), (3, 2))
    ended = run(cli, out)
    assert (ended.code, [no["code"] for no in ended.report["refused"]]) == (4, ["tied-weights"])
    ended = run(cli, out, shared="clone")
    assert (ended.code, ended.report["status"]) == (0, "fused"), ended.err
    state = load_file(FUSED)
    assert torch.equal(state["tied.weight"], folder.tied.weight)
    assert not torch.equal(state["out.weight"], folder.tied.weight)


def test_the_adapter_is_never_overwritten(cli: Cli, folder: Any) -> None:
    assert run(cli, Q).code == 0
    before = Path("adapter.safetensors").read_bytes()
    words = ("fuse", "base.safetensors", "--spec", "fuse.yaml", *ALLOW, "--force")
    assert cli(*words, "-o", "adapter.safetensors").code == 2
    assert cli(*words, "--report", "json=adapter.safetensors").code == 2
    assert Path("adapter.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------- the laws


def bits(value: Tensor, by: int) -> Fraction:
    """The neighbour of a float32 or bfloat16 number, exactly."""
    whole = torch.int32 if value.dtype is torch.float32 else torch.int16
    return Fraction(float((value.clone().view(whole) + by).view(value.dtype)))


def assert_nearest(stored: Tensor, exact: Fraction) -> None:
    gap = abs(Fraction(float(stored)) - exact)
    assert all(gap <= abs(bits(stored, by) - exact) for by in (-1, 1)), (stored, float(exact))


def exact_sum(weight: Tensor, down: Tensor, up: Tensor, scale: float, at: tuple[int, ...]) -> Fraction:
    o, *inner = at
    products = (
        Fraction(float(up[o, k].flatten()[0])) * Fraction(float(down[(k, *inner)]))
        for k in range(down.shape[0])
    )
    return Fraction(float(weight[at])) + Fraction(scale) * sum(products, Fraction(0))


@pytest.mark.parametrize("scale", [2.0, -0.7, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 64])
def test_the_exact_sum_rounded_once(rank: int, dtype: torch.dtype, scale: float, tmp_path: Path) -> None:
    net = nets.randomise(nets.chain(q=nn.Linear(4, 5)), 0).to(dtype)
    tensors = pair("q", (rank, 4), (5, rank))
    save_file(tensors, tmp_path / "a.safetensors")
    x = nets.images(3, 4).to(dtype)
    outcome = fuse(net, x, adapter={"file": str(tmp_path / "a.safetensors"), "scale": scale})
    assert outcome.exit_code == 0, outcome.verification
    assert outcome.model is not None
    stored = outcome.model.q.weight.detach()
    assert stored.dtype is dtype
    down, up = tensors.values()
    for o in range(5):
        for i in range(4):
            assert_nearest(stored[o, i], exact_sum(net.q.weight.detach(), down, up, scale, (o, i)))


@pytest.mark.parametrize("peft", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_convolution_with_its_own_geometry(rank: int, peft: bool, tmp_path: Path) -> None:
    make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    more = {} if peft else {"padding_mode": "reflect", "dilation": 2}
    net = nets.randomise(nets.chain(conv=make(3, 6, 3, stride=2, padding=1, **more)), 0)
    tensors = pair("conv", (2, 3, *[3] * rank), (6, 2, *[1] * rank))
    if not peft:
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    outcome = fuse(
        net, nets.images(2, 3, *[6] * rank), adapter={"file": str(tmp_path / "a.safetensors"), "alpha": 4}
    )
    assert outcome.exit_code == 0, outcome.verification
    assert outcome.model is not None
    down, up = (t.double() for t in tensors.values())
    exact = net.conv.weight.double() + 2.0 * torch.einsum(
        "or...,rikz->oikz", up.flatten(2)[..., 0], down.flatten(2)[..., None]
    ).view(6, 3, *[3] * rank)
    stored = outcome.model.conv.weight.detach().double()
    assert ((stored - exact).abs() <= exact.abs() * 2.0**-24 * (1 + 1e-6)).all()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"padding": 1, "padding_mode": "reflect"}, "it pads with padding_mode 'reflect'"),
        ({"padding": "same", "dilation": 2}, "it is a convolution of dilation (2, 2)"),
    ],
)
def test_a_convolution_that_peft_has_trained_otherwise(
    more: dict[str, Any], message: str, named: bool, tmp_path: Path
) -> None:
    """PEFT makes A with the layer's stride and padding only, so what was trained is no sum of W and B A."""
    net = nets.chain(conv=nn.Conv2d(3, 6, 3, **more))
    tensors = pair("conv", (2, 3, 3, 3), (6, 2, 1, 1))
    if not named:  # PEFT's configuration lies beside it
        tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(RefusedError) as refused:
        fuse(net, nets.images(2, 3, 6, 6), adapter={"file": str(tmp_path / "a.safetensors"), "alpha": 4})
    assert message in str(refused.value)


def test_what_an_adapted_layer_computes() -> None:
    layer = nets.randomise(nn.Linear(4, 5), 0)
    base, x = (nets.randomise(nn.Linear(4, 5), 0), torch.randn(3, 4))
    adapt(layer, 2, -0.5, (torch.float32, torch.float32))
    assert isinstance(layer, Adapted)
    down, up = Q.values()
    layer.lora_A.data, layer.lora_B.data = down.clone(), up.clone()
    assert torch.allclose(layer(x), base(x) - 0.5 * F.linear(F.linear(x, down), up))
    holder = nn.ModuleDict({"layer": layer})
    apply_rewrite(ModuleTree(holder), Rewrite(edits=(Plain("layer"),)))
    assert type(holder["layer"]) is nn.Linear
    assert holder.state_dict().keys() == {"layer.weight", "layer.bias"}
    assert torch.allclose(layer(x), base(x) - 0.5 * F.linear(F.linear(x, down), up), atol=1e-5)


# ----------------------------------------------------------------------------------------------- files


NAMES: dict[str, Callable[[str], str]] = {
    "PEFT": lambda name: name,
    "PEFT, in memory": lambda name: name.replace(".weight", ".default.weight"),
    "plain": lambda name: name.removeprefix("base_model.model.").removesuffix(".weight"),
    "plain, with weight": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("style", NAMES)
def test_two_layers_and_a_round_trip(cli: Cli, folder: Any, style: str) -> None:
    tensors = {NAMES[style](name): tensor for name, tensor in {**Q, **CONV}.items()}
    ended = run(cli, tensors)
    assert ended.code == 0, ended.err
    report = ended.report
    assert {tuple(g["modules"]): g["rule"] for g in report["groups"]} == {("conv",): "lora", ("q",): "lora"}
    assert [e["where"] for e in report["ledger"] if e["kind"] == "adapter"] == ["adapter.safetensors"]
    state = load_file(FUSED)
    assert state.keys() == folder.state_dict().keys()
    names: dict[str, Any] = {}
    exec(NET, names)
    fused = fusecli.load_fused(names["Net"](), FUSED)
    x = nets.images(2, 2, 6, 6)
    down, up = (t.double() for t in Q.values())
    assert torch.equal(fused.q.weight, (folder.q.weight.double() + 2.0 * up @ down).float())
    assert not torch.allclose(fused(x), folder(x))
    assert run(cli, tensors, "verify").code == 0


def scale_of(cli: Cli, config: Mapping[str, Any] | None, **adapter: Any) -> float:
    if config is not None:
        Path("adapter_config.json").write_text(json.dumps(config))
    ended = run(cli, Q, adapter={"file": "adapter.safetensors", **adapter})
    assert ended.code == 0, ended.err
    down, up = (t.double() for t in Q.values())
    base, merged = load_file("base.safetensors")["q.weight"], load_file(FUSED)["q.weight"]
    return float(((merged.double() - base) / (up @ down)).median())


def test_where_the_scale_is_said(cli: Cli, folder: Any) -> None:
    assert scale_of(cli, None, scale=-3) == pytest.approx(-3)
    assert scale_of(cli, None, alpha=16) == pytest.approx(8)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "use_dora": False, "fan_in_fan_out": False}
    assert scale_of(cli, config) == pytest.approx(3)
    assert scale_of(cli, {**config, "use_rslora": True}) == pytest.approx(6 / 2**0.5)
    assert scale_of(cli, {**config, "r": 8, "rank_pattern": {"q": 2}}) == pytest.approx(3)
    assert scale_of(cli, config, scale=1) == pytest.approx(1)  # the spec goes first


ALIASED = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = self.a

    def forward(self, x):
        return self.b(self.a(x).relu())
"""


def test_a_layer_with_two_names(cli: Cli, folder: Any) -> None:
    """Whether it is adapted at its other name nobody says."""
    Path("net.py").write_text(ALIASED)
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(ALIASED, "net.py", "exec"), names)
    torch.save(names["Net"]().state_dict(), "base.pt")
    save_file(pair("a", (2, 3), (3, 2)), "adapter.safetensors")
    adapter = {"file": "adapter.safetensors", "scale": 2.0}
    Path("fuse.yaml").write_text(json.dumps({**SPEC, "inputs": [{"shape": [2, 3]}], "adapter": adapter}))
    ended = cli("fuse", "base.pt", "--spec", "fuse.yaml", *ALLOW)
    said = " ".join(ended.err.split())
    assert (ended.code, "a: it is the same module as b (shared-module)" in said) == (4, True), ended.err
    with pytest.raises(RefusedError, match="shared-module"):
        fuse(names["Net"](), torch.randn(2, 3), adapter=adapter)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_in_float32_on_a_base_in_half(cli: Cli, folder: Any, base: torch.dtype) -> None:
    """Added in float64 and rounded once, to the dtype of the base."""
    state = {name: t.to(base) if t.is_floating_point() else t for name, t in folder.state_dict().items()}
    save_file({name: t.contiguous().clone() for name, t in state.items()}, "base.safetensors")
    save_file(Q, "adapter.safetensors")
    dtype = str(base).removeprefix("torch.")
    adapter = {"file": "adapter.safetensors", "scale": 2.0}
    inputs = [{"shape": [2, 2, 6, 6], "dtype": dtype}]
    Path("fuse.yaml").write_text(json.dumps({**SPEC, "inputs": inputs, "adapter": adapter}))
    ended = cli("fuse", "base.safetensors", "--spec", "fuse.yaml", *ALLOW)
    assert ended.code == 0, ended.err + ended.out
    assert cli("verify", "base.safetensors", FUSED, "--spec", "fuse.yaml", *ALLOW).code == 0
    down, up = (t.double() for t in Q.values())
    merged = state["q.weight"].double() + 2.0 * up @ down
    assert torch.equal(load_file(FUSED)["q.weight"], merged.to(base))


def test_with_other_folds_in_the_same_run(cli: Cli, folder: Any) -> None:
    ended = run(cli, {**Q, **CONV}, discover=True)
    assert ended.code == 0, ended.err
    found = {tuple(g["modules"]): g["rule"] for g in ended.report["groups"]}
    assert found[("conv", "bn")] == "lora+conv_bn"
    assert found[("ln", "q", "k")] == "lora+gain_linear"
    state = load_file(FUSED)
    down, up = (t.double() for t in Q.values())
    merged = folder.q.weight.detach().double() + 2.0 * up @ down
    exact = merged * folder.ln.weight.detach().double()
    stored = state["q.weight"].double()
    assert ((stored - exact).abs() <= exact.abs() * 2.0**-24 * (1 + 1e-6)).all()
    exact_bias = folder.q.bias.detach().double() + merged @ folder.ln.bias.detach().double()
    assert torch.equal(state["q.bias"], exact_bias.float())
    ended = run(cli, {**Q, **CONV}, "verify")
    assert (ended.code, len(ended.report["groups"])) == (0, 2)
    listed = run(cli, {**Q, **CONV}, groups=[["conv", "bn"]])
    assert {tuple(g["modules"]): g["rule"] for g in listed.report["groups"]} == {
        ("conv", "bn"): "lora+conv_bn",
        ("q",): "lora",
    }


def test_with_bake_in_the_same_run(cli: Cli, folder: Any) -> None:
    ended = run(cli, Q, bake=True, groups=[["normed"]])
    found = {tuple(g["modules"]): g["rule"] for g in ended.report["groups"]}
    assert (ended.code, found) == (0, {("normed",): "bake", ("q",): "lora"})


def test_plan_lists_the_adapted_layers(cli: Cli, folder: Any) -> None:
    Path("specs").mkdir()
    save_file(Q, "adapter.safetensors")
    Path("fuse.yaml").write_text(json.dumps({**SPEC, "adapter": {"file": "adapter.safetensors", "scale": 2}}))
    words = ("base.safetensors", "--spec", "fuse.yaml", *ALLOW)
    ended = cli("plan", *words, "-o", "specs/found.yaml")
    assert ended.code == 0, ended.err
    text = Path("specs/found.yaml").read_text()
    assert "adapter: {file: ../adapter.safetensors, scale: 2" in text
    assert "  - [ln, q, k]" in text
    assert cli("fuse", "base.safetensors", "--spec", "specs/found.yaml", *ALLOW).code == 0


def test_another_adapter_is_not_this_one(cli: Cli, folder: Any) -> None:
    assert run(cli, Q).code == 0
    wrong = {name: tensor * (1 + 2.0**-16) for name, tensor in Q.items()}
    ended = run(cli, wrong, "verify")
    assert (ended.code, ended.report["verification"]["judgement"]) == (1, "different")
    assert any("adapter.safetensors" in e["where"] for e in ended.report["ledger"] if e["kind"] == "input")
    ended = run(cli, Q, "verify", adapter={"file": "adapter.safetensors", "scale": 2.0000001})
    assert (ended.code, ended.report["verification"]["judgement"]) == (1, "different")
    ended = run(cli, {**Q, **CONV}, "verify")
    assert (ended.code, ended.report["verification"]["judgement"]) == (1, "different")


def test_without_the_adapter_nothing_is_said_to_be_equal(cli: Cli, folder: Any) -> None:
    assert run(cli, Q).code == 0
    ended = run(cli, Q, "verify", adapter=None)
    assert (ended.code, "an adapter is part of its weights" in problems(ended)) == (2, True)
    ended = cli("verify", "base.safetensors", FUSED)
    assert (ended.code, "an adapter is part of its weights" in problems(ended)) == (2, True)


def test_an_artifact_without_one_is_not_verified_with_one(cli: Cli, folder: Any) -> None:
    assert run(cli, Q, adapter=None, groups=[["conv", "bn"]]).code == 0
    ended = run(cli, Q, "verify")
    assert (ended.code, "no adapter is part of this artifact" in problems(ended)) == (2, True)


def test_the_manifest_names_the_adapter(cli: Cli, folder: Any) -> None:
    import hashlib

    from fusecli.artifact import manifest_of
    from fusecli.checkpoint import open_checkpoint

    assert run(cli, Q).code == 0
    with open_checkpoint(FUSED) as artifact:
        noted = manifest_of(artifact).adapter_sha256
    assert noted == hashlib.sha256(Path("adapter.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "keys", [{}, {"assume": {"eps": 1e-5}, "groups": [["conv", "bn"]]}], ids=["alone", "norm"]
)
def test_without_the_models_code(cli: Cli, folder: Any, keys: Mapping[str, Any]) -> None:
    bare = {"model": None, "inputs": [], **keys}
    ended = run(cli, {**Q, **CONV}, **bare)
    assert ended.code == 0, ended.err
    assert {g["rule"] for g in ended.report["groups"]} == {"lora", "lora+conv_bn" if keys else "lora"}
    assert {g["evidence"] for g in ended.report["groups"]} == {"claimed"}
    down, up = (t.double() for t in Q.values())
    merged = (folder.q.weight.double() + 2.0 * up @ down).float()
    assert torch.equal(load_file(FUSED)["q.weight"], merged)
    assert run(cli, {**Q, **CONV}, "verify", **bare).code == 0
    wrong = {name: tensor * (1 + 2.0**-16) for name, tensor in {**Q, **CONV}.items()}
    assert run(cli, wrong, "verify", **bare).code == 1
    ended = run(cli, pair("qq", (2, 4), (5, 2)), **bare)
    assert (ended.code, "the nearest is q" in problems(ended)) == (2, True)


def test_a_tie_in_a_file_without_code(cli: Cli, folder: Any) -> None:
    shared = torch.randn(5, 4)
    torch.save({"q.weight": shared, "table.weight": shared}, "base.safetensors")
    ended = run(cli, Q, model=None, inputs=[])
    assert (ended.code, "tied-weights" in problems(ended)) == (4, True)


# -------------------------------------------------------------------------------------------- in memory


def test_a_model_in_memory(folder: Any) -> None:
    save_file({**Q, **CONV}, "a.safetensors")
    Path("adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "rank_pattern": {"conv": 3}}')
    before = {name: tensor.clone() for name, tensor in folder.state_dict().items()}
    x = nets.images(2, 2, 6, 6)
    outcome = fuse(folder, x, adapter="a.safetensors", discover=True)
    assert outcome.exit_code == 0, outcome.refused
    assert any(entry.kind == "adapter" for entry in outcome.ledger)
    assert all(torch.equal(t, before[name]) for name, t in folder.state_dict().items())
    assert outcome.model is not None
    assert not any("lora" in name for name in outcome.model.state_dict())
    assert fusecli.verify(folder, outcome.model, x, adapter="a.safetensors").judgement == "equivalent"
    assert fusecli.verify(folder, outcome.model, x).judgement == "different"
    spec = {"adapter": {"file": "a.safetensors", "scale": 2}}
    alone = fuse(folder, x, spec=spec)
    assert [group.modules for group in alone.groups] == [("conv",), ("q",)]


def test_in_memory_a_tie_is_refused_and_a_slip_is_told(folder: Any) -> None:
    save_file(pair("out", (2, 5), (3, 2)), "a.safetensors")
    x = nets.images(2, 2, 6, 6)
    with pytest.raises(RefusedError, match="tied-weights"):
        fuse(folder, x, adapter={"file": "a.safetensors", "scale": 1})
    with pytest.raises(UsageError, match="nothing says its scale"):
        fuse(folder, x, adapter="a.safetensors")


@pytest.mark.parametrize("wrong", ["no scale", "the transpose", "rounded twice", "left out"])
def test_a_wrong_rule_is_found(wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fusecli.algebra import LinearOp
    from fusecli.rules._member import Member

    right = Member.adapter.fget  # type: ignore[attr-defined]  # a property

    def mutated(self: Member) -> Any:
        base, down, up, scale = right(self)
        if wrong == "no scale":
            scale = type(scale)(torch.ones_like(scale.scale), scale.shift, False)
        if wrong == "the transpose":
            up = LinearOp(up.weight.flip(1), up.bias, up.geometry)
        if wrong == "rounded twice":
            down = LinearOp(
                torch.from_numpy(down.weight.numpy().astype("f2").astype("f8")), None, down.geometry
            )
        if wrong == "left out":
            down = LinearOp(down.weight * 0, None, down.geometry)
        return base, down, up, scale

    net = nets.randomise(nets.chain(q=nn.Linear(4, 5)), 0)
    save_file(Q, tmp_path / "a.safetensors")
    monkeypatch.setattr(Member, "adapter", property(mutated))
    outcome = fuse(net, nets.images(3, 4), adapter={"file": str(tmp_path / "a.safetensors"), "scale": 2})
    assert (outcome.exit_code in (1, 4), outcome.model) == (True, None)


def test_the_rule_is_listed() -> None:
    assert "lora" in rules.names()
    assert "s B A" in rules.describe("lora")


def test_names_of_an_adapter_are_data(cli: Cli, folder: Any) -> None:
    ended = run(
        cli,
        {f"q\x1b[31m.{side}": tensor for side, tensor in zip(("lora_A", "lora_B"), Q.values(), strict=True)},
    )
    assert (ended.code, "\x1b" in ended.err) == (2, False)
    deep = ".".join(["q"] * 20_000)
    assert run(cli, {f"{deep}.lora_A": torch.ones(1, 4), f"{deep}.lora_B": torch.ones(5, 1)}).code == 2


def test_wrappers_left_their_names_on_it(cli: Cli, folder: Any) -> None:
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        tensors = {f"{prefix}{name.removeprefix('base_model.model.')}": t for name, t in Q.items()}
        assert run(cli, tensors).code == 0


def test_numbers_that_are_none(cli: Cli, folder: Any) -> None:
    broken = {name: tensor.clone() for name, tensor in Q.items()}
    broken["base_model.model.q.lora_A.weight"][0, 0] = float("nan")
    ended = run(cli, broken)
    assert (ended.code, [no["code"] for no in ended.report["refused"]]) == (4, ["not-finite"])
    huge = {name: tensor * 1e25 for name, tensor in Q.items()}
    ended = run(cli, huge)
    assert (ended.code, [no["code"] for no in ended.report["refused"]]) == (4, ["overflow"])


def test_an_adapted_layer_that_the_inputs_never_reach(cli: Cli, folder: Any) -> None:
    """It is added, but nobody has seen that it is right."""
    spare = NET.replace("self.deep", "self.spare = nn.Linear(4, 5); self.deep", 1)
    Path("net.py").write_text(spare)
    names: dict[str, Any] = {}
    exec(spare, names)
    net = nets.randomise(names["Net"](), 0)
    save_file({k: v.clone() for k, v in net.state_dict().items()}, "base.safetensors")
    ended = run(cli, pair("spare", (2, 4), (5, 2)))
    assert (ended.code, ended.report["verification"]["judgement"]) == (6, "inconclusive")


def test_a_weight_that_something_else_reads(cli: Cli, folder: Any) -> None:
    """Beside the adapter that reader has the weight of the base, and after the merge it would not."""
    reading = NET.replace(
        "return self.out", "x = x + self.q.weight.sum()\n        return self.q.weight.mean() + self.out"
    )
    Path("net.py").write_text(reading)
    ended = run(cli, Q)
    assert (ended.code, [no["code"] for no in ended.report["refused"]]) == (4, ["shared-weight"])


def test_the_same_bytes_each_time(cli: Cli, folder: Any) -> None:
    assert run(cli, {**Q, **CONV}).code == 0
    before = Path(FUSED).read_bytes()
    assert run(cli, {**Q, **CONV}).code == 0
    assert Path(FUSED).read_bytes() == before


def test_bfloat16_base_and_float32_adapter_in_a_file(cli: Cli, folder: Any) -> None:
    state = {
        name: t.bfloat16() if t.is_floating_point() else t
        for name, t in load_file("base.safetensors").items()
    }
    save_file(state, "base.safetensors")
    ended = run(cli, Q, inputs=[{"shape": [2, 2, 6, 6], "dtype": "bfloat16"}])
    assert ended.code == 0, ended.err
    down, up = Q.values()
    stored = load_file(FUSED)["q.weight"]
    for o in range(5):
        assert_nearest(stored[o, 1], exact_sum(state["q.weight"], down, up, 2.0, (o, 1)))
