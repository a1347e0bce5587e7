"""Transformers as people write them: every gain goes into all that read it, or stays where something else
does."""

from __future__ import annotations

import copy
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusecli
from fusecli.algebra import round_once
from fusecli.errors import ExitCode
from fusecli.outcome import Outcome
from tests import transformers
from tests.conftest import Cli
from tests.nets import float64, images, randomise
from tests.proof.nets import net
from tests.rules.side_by_side import relative_error
from tests.rules.wired import RMSNorm, left, refusal, state
from tests.transformers import FOLDED, LENGTH, WIDTH, WORDS, GemmaRMSNorm, LanguageModel, build

GAINS = (nn.LayerNorm, nn.RMSNorm, transformers.LlamaRMSNorm, GemmaRMSNorm)
TOKENS = images(2, LENGTH, WIDTH)
# What stays: the stem of a ConvNeXt, whose readers are a sum and a convolution that pads.
STAYS = {"convnext": {"stem_norm"}}
ATTENTION = ("attention.q", "attention.k", "attention.v")
READERS: dict[str, dict[str, tuple[str, ...]]] = {
    # the layers of a block that read a gain, by its name
    "layer norm": {"norm1": ATTENTION, "norm2": ("mlp.up",)},
    "layer norm, no bias": {"norm1": ATTENTION, "norm2": ("mlp.gate", "mlp.up")},
    "rms norm": {"norm1": ATTENTION, "norm2": ("mlp.gate", "mlp.up")},
    "llama": {"norm1": ATTENTION, "norm2": ("mlp.gate", "mlp.up")},
    "gemma": {"norm1": ATTENTION, "norm2": ("mlp.gate", "mlp.up")},
    "qkv in one, chunk": {"norm1": ("attention.qkv",), "norm2": ("mlp.up",)},
    "qkv in one, split": {"norm1": ("attention.qkv",), "norm2": ("mlp.up",)},
    "qkv in one, view": {"norm1": ("attention.qkv",), "norm2": ("mlp.gate", "mlp.up")},
    "parallel": {"norm": (*ATTENTION, "mlp.up")},
    "parallel, gated": {"norm": (*ATTENTION, "mlp.gate", "mlp.up")},
    "vit": {"norm1": ("attention.qkv",), "norm2": ("mlp.up",)},
    "convnext": {"norm": ("pwconv1",)},
}
SCALES: dict[str, dict[str, str]] = {
    # the layers of a block whose output is scaled, by the scale
    "vit": {"scale1.gamma": "attention.out", "scale2.gamma": "mlp.down"},
    "convnext": {"gamma": "pwconv2"},
}


def trained(variant: str) -> Any:
    return randomise(build(variant), 0)


def inputs_of(model: nn.Module) -> Tensor:
    """Words or images."""
    if isinstance(model, LanguageModel):
        return torch.randint(WORDS, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    return images(2, 3, 8, 8)


def run(model: nn.Module, x: Tensor) -> Tensor:
    """Its output on inputs in its own dtype."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        y: Tensor = model(x.to(dtype) if x.is_floating_point() else x)
        return y


def discovered(model: nn.Module, **options: Any) -> Outcome:
    x = inputs_of(model)
    dtype = next(model.parameters()).dtype
    return fusecli.fuse(model, x.to(dtype) if x.is_floating_point() else x, discover=True, **options)


def gain_of(norm: Any) -> Tensor:
    weight: Tensor = norm.weight.double()
    return 1 + weight if isinstance(norm, GemmaRMSNorm) else weight


def readers(variant: str) -> dict[str, list[str]]:
    """The layers that read each gain."""
    found = {
        f"blocks.{block}.{norm}": [f"blocks.{block}.{name}" for name in names]
        for block in range(2)
        for norm, names in READERS[variant].items()
    }
    return {**found, "norm": ["head"]}


def scaled(variant: str) -> dict[str, list[str]]:
    """The layer before each scale."""
    return {
        f"blocks.{block}.{scale}": [f"blocks.{block}.{layer}"]
        for block in range(2)
        for scale, layer in SCALES.get(variant, {}).items()
    }


@torch.no_grad()
def assert_exact(variant: str, model: Any, fused: Any) -> None:
    """Every gain is neutral, every weight beside one the product of the stored numbers, rounded once, and
    every other tensor what it was."""
    changed: set[str] = set()
    for path, layers in readers(variant).items():
        norm, after = model.get_submodule(path), fused.get_submodule(path)
        assert bool((gain_of(after) == 1).all()), path
        shift = getattr(norm, "bias", None)
        assert shift is None or not bool(after.bias.any()), path
        changed |= {f"{path}.weight", f"{path}.bias"}
        for layer in layers:
            old, new = model.get_submodule(layer), fused.get_submodule(layer)
            product = old.weight.double() * gain_of(norm)
            assert torch.equal(new.weight, round_once(product, old.weight.dtype)), layer
            if shift is not None:
                bias = old.weight.double() @ shift.double() + (0 if old.bias is None else old.bias.double())
                eps = max(torch.finfo(new.bias.dtype).eps, 1e-14)  # sums in another order
                assert torch.allclose(new.bias.double(), bias, rtol=eps, atol=eps), layer
            changed |= {f"{layer}.weight", *([f"{layer}.bias"] if shift is not None else [])}
    for name, (layer,) in scaled(variant).items():
        old, new, gamma = model.get_submodule(layer), fused.get_submodule(layer), model.get_parameter(name)
        product = old.weight.double() * gamma.double()[:, None]
        assert torch.equal(new.weight, round_once(product, old.weight.dtype)), layer
        changed |= {name, f"{layer}.weight", f"{layer}.bias"}
    after = fused.state_dict()
    for key, tensor in model.state_dict().items():
        assert key in changed or torch.equal(after[key], tensor), key


def test_every_variant_is_listed() -> None:
    assert READERS.keys() == FOLDED.keys()


@pytest.mark.parametrize("variant", FOLDED)
def test_every_gain_goes_into_all_that_read_it(variant: str) -> None:
    model = trained(variant)
    outcome = discovered(float64(model))
    verdict = outcome.verification
    assert outcome.status == "fused", verdict
    assert verdict is not None
    assert verdict.float64_error is not None
    assert verdict.float64_error < 1e-11
    gains = {g.modules[0]: list(g.modules[1:]) for g in outcome.groups if g.rule == "gain_linear"}
    assert gains == readers(variant)
    assert [unfused.module for unfused in outcome.unfused] == [*STAYS.get(variant, ())]
    assert_exact(variant, float64(model), outcome.model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", FOLDED)
def test_the_product_is_rounded_once(variant: str, dtype: torch.dtype) -> None:
    model = trained(variant).to(dtype)
    before = state(model)
    outcome = discovered(model)
    assert outcome.status == "fused", outcome.verification
    assert_exact(variant, model, outcome.model)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    if dtype is torch.float32:
        again = discovered(outcome.model)
        assert (again.exit_code, again.groups) == (ExitCode.NOTHING, ())


def test_a_query_of_its_own_reads_another_norm() -> None:
    """Cross attention: two norms, each with readers of its own."""

    def wiring(m: Any, x: Tensor) -> Tensor:
        y, z = m.norm1(x), m.norm2(x.flip(1))
        attended: Tensor = x + (m.q(y) @ m.k(z).transpose(-1, -2)).softmax(-1) @ m.v(z)
        return attended

    q, k, v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
    model = net(wiring, norm1=nn.LayerNorm(WIDTH), norm2=nn.LayerNorm(WIDTH), q=q, k=k, v=v)
    outcome = fusecli.fuse(model, TOKENS, discover=True)
    assert {group.modules for group in outcome.groups} == {("norm1", "q"), ("norm2", "k", "v")}


class TestPostNorm:
    def test_what_goes_past_the_layers_too_stays(self) -> None:
        """Only the last norm is read by a layer alone."""
        model = trained("post-norm")
        outcome = discovered(model)
        assert [group.modules for group in outcome.groups] == [("blocks.1.norm2", "head")]
        stays = {"blocks.0.norm1", "blocks.0.norm2", "blocks.1.norm1"}
        assert {unfused.module for unfused in outcome.unfused} == stays
        after = outcome.model.state_dict()
        touched = {key for key, tensor in model.state_dict().items() if not torch.equal(after[key], tensor)}
        assert touched == {"blocks.1.norm2.weight", "blocks.1.norm2.bias", "head.weight"}

    def test_asked_for_it_is_refused_and_nothing_changes(self) -> None:
        model = trained("post-norm")
        readers_of_norm = [["blocks.0.norm1", "blocks.0.mlp.up"]]
        before = state(model)
        outcome = fusecli.fuse(model, inputs_of(model), groups=readers_of_norm)
        assert (outcome.exit_code, outcome.model) == (ExitCode.REFUSED, None)
        assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


NOT_ALL_LAYERS: dict[str, Callable[[Any, Tensor], Any]] = {
    "added as well": lambda m, x: m.q(y := m.norm(x)) * m.k(y) + y,
    "an activation reads it": lambda m, x: m.q(y := m.norm(x)) * m.k(torch.relu(y)),
    "returned as well": lambda m, x: (m.q(y := m.norm(x)) * m.k(y), y),
    "multiplied by": lambda m, x: m.q(y := m.norm(x)) * y.mean() * m.k(y),
    "one reader mixes tokens": lambda m, x: m.q(y := m.norm(x)) * m.mix(y.transpose(1, 2)).transpose(1, 2),
    "attends without projections": lambda m, x: m.q(y := m.norm(x)) + (y @ y.transpose(1, 2)) @ m.k(y),
}


@pytest.mark.parametrize("norm", [nn.LayerNorm(WIDTH), RMSNorm(WIDTH)], ids=["layer", "rms"])
@pytest.mark.parametrize("case", NOT_ALL_LAYERS)
def test_one_reader_that_is_no_layer(case: str, norm: nn.Module) -> None:
    q, k, mix = (nn.Linear(size, size) for size in (WIDTH, WIDTH, LENGTH))
    model = net(NOT_ALL_LAYERS[case], norm=norm, q=q, k=k, mix=mix)
    left(model, TOKENS)
    refusal(model, TOKENS, ["norm", "q", "k"])


class TestTied:
    """The head's weight is the embedding's."""

    def test_the_last_gain_stays_and_so_does_the_tie(self) -> None:
        model = trained("tied")
        outcome = discovered(model)
        assert [(unfused.module, unfused.code) for unfused in outcome.unfused] == [("norm", "tied-weights")]
        assert len(outcome.groups) == 4
        assert outcome.model.head.weight is outcome.model.words.weight
        assert torch.equal(outcome.model.words.weight, model.words.weight)

    def test_asked_for_it_is_refused(self) -> None:
        model = trained("tied")
        assert refusal(model, inputs_of(model), ["norm", "head"]) == "tied-weights"

    def test_clone_breaks_the_tie_and_says_so(self) -> None:
        model = trained("tied")
        outcome = discovered(model, shared="clone")
        assert (outcome.status, outcome.unfused, len(outcome.groups)) == ("fused", (), 5)
        assert [entry.where for entry in outcome.ledger if entry.kind == "tie"] == ["head"]
        fused = outcome.model
        assert torch.equal(fused.words.weight, model.words.weight)
        product = model.head.weight.double() * model.norm.weight.double()
        assert torch.equal(fused.head.weight, product.float())
        assert model.head.weight is model.words.weight


MULTIHEAD: dict[str, Callable[[Any, Tensor], Any]] = {
    "attention": lambda m, x: x + m.inner(y := m.norm(x), y, y, need_weights=False)[0],
    "its weights too": lambda m, x: m.inner(y := m.norm(x), y, y),
    "and a scale behind": lambda m, x: x + m.scale(m.inner(y := m.norm(x), y, y)[0]),
}


class TestLibraryModules:
    """torch's own modules use weights of their children by functions, and have ways of their own in eval."""

    @pytest.mark.parametrize("case", MULTIHEAD)
    def test_multihead_attention_is_left(self, case: str) -> None:
        inner = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        scale = transformers.LayerScale()
        model = net(MULTIHEAD[case], norm=nn.LayerNorm(WIDTH), inner=inner, scale=scale)
        left(model, TOKENS)
        for group in (["norm", "inner"], ["norm", "inner.out_proj"], ["inner.out_proj", "scale"]):
            refusal(model, TOKENS, group)

    @pytest.fixture
    def fast(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        """Notes each time that the way through one native function is taken."""
        calls: list[str] = []
        native = torch._transformer_encoder_layer_fwd

        def noted(*args: Any, **kwargs: Any) -> Tensor:
            calls.append("fast")
            return native(*args, **kwargs)

        monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", noted)
        return calls

    @pytest.mark.parametrize("activation", ["relu", "gelu"])
    @pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
    def test_an_encoder_layer_and_its_fast_path(
        self, norm_first: bool, activation: str, fast: list[str]
    ) -> None:
        options: dict[str, Any] = {"norm_first": norm_first, "activation": activation, "batch_first": True}
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, **options)
        model: Any = randomise(
            nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False), 0
        )
        model, x = float64(model), TOKENS.double()
        outcome = fusecli.fuse(model, x, discover=True)
        wanted = [(f"layers.{i}.norm2", f"layers.{i}.linear1") for i in range(2)] if norm_first else []
        assert [group.modules for group in outcome.groups] == wanted
        fast.clear()
        with torch.no_grad():
            one, other = model(x), outcome.model(x)
        assert fast == ["fast"] * 4
        assert relative_error(other, one) < 1e-11
        slow = outcome.model(x.requires_grad_())
        assert fast == ["fast"] * 4
        assert relative_error(slow, one) < 1e-11

    def test_a_decoder_layer(self) -> None:
        layer = nn.TransformerDecoderLayer(WIDTH, 2, 12, batch_first=True, norm_first=True)
        outcome = fusecli.fuse(randomise(layer, 0), (TOKENS, images(2, 3, WIDTH)), discover=True)
        assert [group.modules for group in outcome.groups] == [("norm3", "linear1")]
        assert {unfused.module for unfused in outcome.unfused} == {"norm1", "norm2"}


FUSED = Path("model.fused.safetensors")
Save = Callable[..., Any]


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """Puts net.py and model.pt, a network by its name, into the working folder; returns the network."""
    monkeypatch.chdir(tmp_path)

    def save(variant: str, dtype: torch.dtype = torch.float32) -> Any:
        Path("net.py").write_text(Path(transformers.__file__).read_text())
        model = trained(variant).to(dtype)
        torch.save(model.state_dict(), "model.pt")
        return model

    return save


def words_for(variant: str, model: nn.Module) -> list[str]:
    tokens = isinstance(model, LanguageModel)
    given = f"2x{LENGTH}:int64:0..{WORDS}" if tokens else "2x3x8x8"
    if not tokens and next(model.parameters()).dtype is torch.bfloat16:
        given += ":bfloat16"
    return ["--model", f"net.py:build(variant={variant!r})", "--input", given]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["layer norm", "llama", "gemma", "qkv in one, split", "vit", "convnext"])
def test_from_the_command_line(cli: Cli, saved: Save, variant: str, dtype: torch.dtype) -> None:
    model = saved(variant, dtype)
    words = words_for(variant, model)
    ended = cli("fuse", "model.pt", "--discover", *words, "--report", "json=-")
    assert (ended.code, ended.report["status"]) == (0, "fused"), ended.err
    assert ended.report["verification"]["float64_error"] < 1e-9
    assert {norm["module"] for norm in ended.report["unfused"]} == STAYS.get(variant, set())
    program, *step = shlex.split(ended.report["next_step"])
    assert program == "fusecli"
    ended = cli(*step, "--report", "json=-")
    assert (ended.code, ended.report["status"]) == (0, "verified"), ended.err
    fused = fusecli.load_fused(build(variant).to(dtype), FUSED)
    assert_exact(variant, model, fused)


@pytest.mark.parametrize("variant", ["rms norm", "parallel, gated"])
def test_from_a_spec_that_lists_the_groups(cli: Cli, saved: Save, variant: str) -> None:
    model = saved(variant)
    spec = {
        "version": 1,
        "model": {"factory": "net.py:build", "kwargs": {"variant": variant}},
        "inputs": [{"shape": [2, LENGTH], "dtype": "int64", "range": [0, WORDS]}],
        "groups": [[norm, *layers] for norm, layers in readers(variant).items()],
    }
    Path("fuse.yaml").write_text(json.dumps(spec))
    words = ("--spec", "fuse.yaml", "--allow-code", "net.py", "--report", "json=-")
    ended = cli("fuse", "model.pt", *words)
    assert (ended.code, len(ended.report["groups"])) == (0, len(readers(variant))), ended.err
    assert cli("verify", "model.pt", FUSED, *words).code == 0
    assert_exact(variant, model, fusecli.load_fused(build(variant), FUSED))


@pytest.mark.parametrize("shared", ["refuse", "clone"])
def test_tied_from_the_command_line(cli: Cli, saved: Save, shared: str) -> None:
    model = saved("tied")
    words = [*words_for("tied", model), "--shared", shared]
    ended = cli("fuse", "model.pt", "--discover", *words, "--report", "json=-")
    assert (ended.code, ended.report["status"]) == (0, "fused"), ended.err
    fused: Any = fusecli.load_fused(build("tied"), FUSED)
    kept = shared == "refuse"
    assert (fused.head.weight is fused.words.weight) == kept
    assert [norm["code"] for norm in ended.report["unfused"]] == (["tied-weights"] if kept else [])
    ties = [entry["where"] for entry in ended.report["ledger"] if "copy of its own" in entry["what"]]
    assert ties == ([] if kept else ["head"])
    _, *step = shlex.split(ended.report["next_step"])
    assert cli(*step).code == 0
    tokens = inputs_of(model)
    assert relative_error(run(fused, tokens), run(copy.deepcopy(model).double(), tokens)) < 1e-5
