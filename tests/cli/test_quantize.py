"""int8 on files: what is written and what is not, what decides, and what verify sees in the file again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fusecli
from configs.digits.net import DigitsNet
from fusecli.cli.app import main
from fusecli.commands import int8, int8_facts
from fusecli.int8.latency import latency
from tests import torch_ao_qat
from tests.conftest import DIGITS, Cli, Run
from tests.nets import randomise

ROOT = Path(__file__).resolve().parents[2]
ALLOW = ["--allow-code", "net.py"]
WORDS = ["--spec", "quantize.yaml", *ALLOW]
SUITES = ("calibration.safetensors", "heldout.safetensors", "model.pt", "net.py", "quantize.yaml")
PROGRAM = "from fusecli.cli.app import main; main()"

NETS = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(self.a(x).relu())

class Scores(Plain):
    def forward(self, x):
        return super().forward(x)[:, :, None]

class Branches(Plain):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)

class Random(Plain):
    def forward(self, x):
        return super().forward(x + torch.randn(5))

class Smooth(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return nn.functional.gelu(x) * self.gain

class Norms(nn.Module):
    '''A norm that no layer can take, and one that its layer takes.'''

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.bn = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(self.conv(nn.functional.gelu(self.first(x)))).mean((2, 3))

class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)

    def forward(self, x):
        return nn.functional.max_pool2d(self.conv(x), 2).mean((2, 3))

class Joined(nn.Module):
    '''A head of eight, the last four a thousand times smaller; they share the scale of the output.'''

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x):
        return torch.cat([1000 * self.a(x), self.b(x)], 1)

class One(Plain):
    def forward(self, x):
        return super().forward(x)[:, 0].exp()

class OneRow(One):
    def forward(self, x):
        return super().forward(x)[:, None]

class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, table, scale=None):
        y = self.b(self.a(x).relu()) + table[:1]
        return y if scale is None else y * scale
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured for half a second for a user, is measured for no longer than it takes here."""
    monkeypatch.setattr(
        int8, "latency", lambda models, sample, seconds: latency(models, sample, seconds=0.01)
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in a folder of the module, quantized into out.pt2 and out.safetensors."""
    folder = tmp_path_factory.mktemp("quantized")
    for name in (*SUITES, "fuse.yaml"):
        shutil.copy(DIGITS / name, folder)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    reports = ["--report", "json=r.json", "--report", "md=r.md"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "quantize", "model.pt", *WORDS, "-o", "out.pt2", *reports],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    (folder / "terminal.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(int8, "latency", lambda models, sample, seconds: latency(models, sample, seconds=0.01))
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", ["fusecli", "quantize", "model.pt", *WORDS, "-o", "out.safetensors", "-q"])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main()
    assert {name: (folder / name).read_bytes() for name in kept} == kept
    return folder


@pytest.fixture
def folder(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of the shared one, to be written to."""
    copied = tmp_path / "digits"
    shutil.copytree(shared, copied)
    monkeypatch.chdir(copied)
    return copied


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary folders are made, which has to be empty in the end."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    yield place
    assert list(place.iterdir()) == []


Small = Callable[..., None]


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Small:
    """Makes net.py, model.pt, data.safetensors and quantize.yaml in the working folder."""
    place = tmp_path / "small"
    place.mkdir()
    monkeypatch.chdir(place)
    rng = torch.Generator().manual_seed(0)
    x, image = torch.randn(70, 5, generator=rng), torch.randn(9, 3, 8, 8, generator=rng)
    one = x.clone()
    one[69, 0] = float("nan")
    data = {"x": x, "image": image, "nan": one, "none": x[:0], "wide": torch.randn(9, 3, 9, 9, generator=rng)}
    data |= {"table": torch.randn(7, 3, generator=rng), "scale": torch.rand(70, 1, generator=rng) + 1}
    data |= {"label": torch.arange(70) % 3, "short": torch.zeros(5, dtype=torch.int64), "text": x[:, 0] > 0}
    data |= {"half": torch.full((70,), 0.5), "ten": torch.arange(70) % 10, "minus": torch.arange(70) % 3 - 1}
    save_file({name: tensor.contiguous() for name, tensor in data.items()}, "data.safetensors")
    Path("net.py").write_text(NETS)
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(NETS, "net.py", "exec"), names)

    def make(cls: str = "Plain", *inputs: Any, **quantize: Any) -> None:
        torch.save(randomise(names[cls](), 0).state_dict(), "model.pt")
        quantize = {"threshold": {"cosine": 0.9}, **quantize}
        spec = {"version": 1, "model": {"factory": f"net.py:{cls}"}, "quantize": quantize}
        Path("quantize.yaml").write_text(json.dumps({**spec, "inputs": inputs or [data_of("x")]}))

    return make


def data_of(key: str, **more: str) -> dict[str, str]:
    return {"file": "data.safetensors", "key": key, **more}


def spec_with(quantize: Mapping[str, Any] | None = None, **changes: Any) -> None:
    """The spec of the working folder with other values; None takes a key out."""
    import yaml

    spec = yaml.safe_load((DIGITS / "quantize.yaml").read_text())
    spec |= {**changes, "quantize": {**spec["quantize"], **(quantize or {})}}
    Path("quantize.yaml").write_text(json.dumps({k: v for k, v in spec.items() if v is not None}))


def quantized(cli: Cli, *words: str | Path, checkpoint: str = "model.pt", out: str = "o.safetensors") -> Run:
    return cli("quantize", checkpoint, *WORDS, "-o", out, "--force", *words)


def verified(cli: Cli, name: str, *words: str) -> Run:
    return cli("verify", "model.pt", name, *WORDS, *words)


def said(run: Run) -> str:
    return " ".join((run.out + run.err).split())


def facts(path: str = "out.safetensors") -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["fusecli"])


def nothing_at(name: str) -> bool:
    """Neither the file nor the stage of it."""
    return [path.name for path in Path().iterdir() if path.name.strip(".").startswith(name)] == []


# --- what is written


def test_the_report_has_the_numbers(shared: Path) -> None:
    report = json.loads((shared / "r.json").read_text())
    found = report["quantization"]
    assert (report["command"], report["status"], report["exit_code"]) == ("quantize", "quantized", 0)
    noise = [unit["sqnr"] for unit in found["units"]]
    assert noise == sorted(noise)
    assert len(noise) == 9
    assert all(0.9 < unit["cosine"] <= 1 for unit in found["units"])
    assert {one["kind"] for one in found["left"]} == {"leaky_relu", "avg_pool2d", "view"}
    assert all(one["reason"] for one in found["left"])
    assert found["accuracy"].keys() == found["latency"].keys() == found["bytes"].keys()
    assert set(found["accuracy"]) == {"float", "fused", "int8"}
    assert found["accuracy"]["float"] - found["accuracy"]["int8"] <= 0.01
    assert found["bytes"]["int8"] == report["output"]["bytes"] == (shared / "out.pt2").stat().st_size
    assert found["bytes"]["int8"] < found["bytes"]["fused"] / 2
    assert found["options"] == {"observer": "minmax", "weights": "per-channel"}
    assert found["asked"] == {"cosine": 0.98, "accuracy_drop": 1}
    assert found["calibration"] == "128 samples of calibration.safetensors:images"


def test_the_accuracies_are_those_of_the_models(shared: Path) -> None:
    held = load_file(shared / "heldout.safetensors")
    images, labels = held["images"], held["labels"].long()
    net = DigitsNet().eval()
    net.load_state_dict(torch.load(shared / "model.pt", weights_only=True)["model_state_dict"])
    made = fusecli.load_int8(shared / "out.pt2", allow_pickle=True)
    with torch.no_grad():
        right = {"float": net(images), "int8": made(images)}
    accuracy = json.loads((shared / "r.json").read_text())["quantization"]["accuracy"]
    for name, scores in right.items():
        assert accuracy[name] == pytest.approx(float((scores.argmax(1) == labels).double().mean()))


def test_the_terminal_is_quiet_and_narrow(shared: Path) -> None:
    assert (shared / "stderr.txt").read_text() == ""
    lines = (shared / "terminal.txt").read_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)
    text = " ".join(" ".join(lines).split())
    for phrase in ("up.conv (conv_transpose2d)", "same top-1", "accuracy", "cosine at least 0.98", "next"):
        assert phrase in text


def test_the_markdown_has_tables(shared: Path) -> None:
    text = (shared / "r.md").read_text()
    for phrase in ("### Int8", "unit, worst first", "`head.classifier`", "| accuracy |", "stays float"):
        assert phrase in text


def test_it_leaves_nothing_behind(shared: Path) -> None:
    made = {"out.pt2", "out.safetensors", "r.json", "r.md", "terminal.txt", "stderr.txt"}
    names = {path.name for path in shared.iterdir() if path.name != "__pycache__"}
    # torch's compiler keeps a folder of its own in the temporary one.
    assert {name for name in names if not name.startswith("torchinductor")} == {*SUITES, "fuse.yaml", *made}


@pytest.mark.parametrize("fmt", ["pt2", "safetensors"])
def test_the_same_work_gives_the_same_bytes(folder: Path, cli: Cli, fmt: str) -> None:
    assert quantized(cli, out=f"other.{fmt}").code == 0
    assert Path(f"other.{fmt}").read_bytes() == Path(f"out.{fmt}").read_bytes()


def test_names_are_those_of_the_float_model_though_groups_list_relus(shared: Path) -> None:
    stored = load_file(shared / "out.safetensors")
    plain = {name for name in stored if not name.endswith((".scale", ".zero_point"))}
    weights = {name for name in DigitsNet().state_dict() if ".bn." not in name}
    assert plain == weights | {name.replace(".weight", ".bias") for name in weights}
    assert stored["stem.conv.weight"].dtype == torch.int8


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "odd.pt2", "--format", "safetensors"],
        ["-o", "odd.safetensors", "--format", "pt2"],
        ["-o", "odd.bin"],
    ],
)
def test_a_name_may_say_another_format(small: Small, cli: Cli, words: list[str]) -> None:
    small()
    assert cli("quantize", "model.pt", *WORDS, *words).code == 0
    assert verified(cli, words[1], "--allow-pickle").code == 0


def test_the_name_is_the_stem_with_int8(small: Small, cli: Cli) -> None:
    small()
    assert cli("quantize", "model.pt", *WORDS).code == 0
    assert Path("model.int8.pt2").is_file()
    done = cli("quantize", "model.pt", *WORDS)
    assert (done.code, "the output exists already" in done.err) == (2, True)


@pytest.mark.parametrize(
    "name", ["model.pt", "quantize.yaml", "net.py", "heldout.safetensors", "calibration.safetensors"]
)
def test_no_input_is_replaced(digits: Path, cli: Cli, name: str) -> None:
    for file in SUITES:
        shutil.copy(DIGITS / file, digits)
    before = Path(name).read_bytes()
    assert quantized(cli, out=name).code == 2
    assert quantized(cli, "--dry-run", "--report", f"json={name}").code == 2
    assert Path(name).read_bytes() == before


# --- thresholds


def test_what_is_below_is_not_written(folder: Path, cli: Cli, temporary: Path) -> None:
    spec_with({"threshold": {"sqnr": 60, "cosine": 0.9999999, "top1": 1.0, "accuracy_drop": 0}})
    done = quantized(cli)
    assert done.code == 1
    assert "the SQNR of the output is 36.7 dB, at least 60 dB was asked for" in said(done)
    assert "the cosine of the output is 0.9999, at least 0.9999999 was asked for" in said(done)
    assert "agreement" not in said(done)
    assert nothing_at("o.safetensors")


def test_without_a_threshold_nothing_is_decided(small: Small, cli: Cli, temporary: Path) -> None:
    small(threshold={})
    done = quantized(cli)
    assert done.code == 6
    assert "add quantize: {threshold: {cosine: 0.98}} to the spec, or --threshold cosine=0.98" in said(done)
    assert nothing_at("o.safetensors")
    dry = quantized(cli, "--dry-run")
    assert (dry.code, "this writes nothing: no threshold says" in said(dry)) == (0, True)
    assert quantized(cli, "--threshold", "cosine=0.9, sqnr=15").code == 0
    assert "asked cosine at least 0.9, sqnr" not in said(dry)


def test_a_typed_threshold_takes_the_place_of_the_one_in_the_spec(small: Small, cli: Cli) -> None:
    small(threshold={"sqnr": 90}, calibrate=[data_of("x")], batch=9)
    assert quantized(cli).code == 1
    done = quantized(cli, "--threshold", "cosine=0.9", "--report", "json=-")
    assert (done.code, done.report["quantization"]["asked"]) == (0, {"cosine": 0.9})
    assert done.report["quantization"]["calibration"] == "70 samples of data.safetensors:x"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("cosine=-1", "a threshold that everything passes proves nothing"),
        ("top1=0", "a threshold that everything passes proves nothing"),
        ("accuracy_drop=100", "a threshold that everything passes proves nothing"),
        ("sqnr=0", "sqnr is above 0, found 0"),
        ("cosine=98", "cosine is between -1 and 1, found 98"),
        ("top1=-0.1", "top1 is between 0 and 1, found -0.1"),
        ("sqnr=nan", "a finite number is expected"),
        ("sqnr=inf", "a finite number is expected"),
        ("cosine", "'cosine' is no threshold"),
        ("cosine=0.9,", "'' is no threshold"),
        ("cosine=0.9,cosine=0.5", "cosine is given twice"),
    ],
)
def test_thresholds_that_say_nothing(small: Small, cli: Cli, typed: str, message: str) -> None:
    small()
    done = quantized(cli, "--threshold", typed)
    assert (done.code, message in done.err) == (2, True)


def test_an_unknown_threshold_is_named(small: Small, cli: Cli) -> None:
    small()
    done = quantized(cli, "--threshold", "cosin=0.9")
    assert (done.code, "did you mean 'cosine'?" in done.err) == (2, True)
    small(observr="minmax")
    done = quantized(cli)
    assert (done.code, "did you mean 'observer'?" in done.err) == (2, True)


@pytest.mark.parametrize("threshold", [{"cosine": 0.98}, {"sqnr": 30}])
def test_a_large_channel_hides_no_small_one(small: Small, cli: Cli, threshold: dict[str, float]) -> None:
    small("Joined", threshold=threshold)
    done = quantized(cli, "--report", "json=-")
    found = done.report["quantization"]
    assert (done.code, found["cosine"] > 0.999, found["sqnr"] > 30) == (1, True, True)
    assert found["channel_sqnr"]["value"] < 10
    assert found["constant"] == [f"channel {n} of 8" for n in range(4, 8)]
    assert any("one number in int8, though it varies in float" in line for line in done.report["problems"])
    assert nothing_at("o.safetensors")
    assert "channel 4 of 8" in said(quantized(cli))
    small("Joined", threshold={**threshold, "whole": True})
    done = quantized(cli)
    assert (done.code, "asked of the output as a whole" in said(done)) == (0, True)
    assert "one number in int8, not in float: channel 4 of 8" in said(done)


@pytest.mark.parametrize("cls", ["One", "OneRow"])
def test_the_cosine_of_one_number_is_no_measure(small: Small, cli: Cli, cls: str) -> None:
    small(cls)
    for words in ([], ["--dry-run"]):
        done = quantized(cli, *words)
        assert done.code == 2
        assert "quantize.yaml:1:" in done.err  # the line, if there were more than one
        assert "the cosine of one number is its sign" in done.err
        assert "ask for sqnr instead: {sqnr: 20}" in done.err
    assert nothing_at("o.safetensors")
    done = quantized(cli, "--threshold", "sqnr=10", "--report", "json=-")
    found = done.report["quantization"]
    assert (done.code, found["cosine"], found["worst_cosine"]) == (0, None, None)
    done = verified(cli, "o.safetensors")
    assert (done.code, "ask for sqnr instead" in done.err) == (2, True)
    assert verified(cli, "o.safetensors", "--threshold", "sqnr=10").code == 0


def test_a_drop_of_accuracy_needs_labels(small: Small, cli: Cli) -> None:
    small(threshold={"accuracy_drop": 1})
    for words in ([], ["--dry-run"]):
        done = quantized(cli, *words)
        assert (done.code, "accuracy_drop needs labels, and the inputs have none" in done.err) == (2, True)


def test_top1_of_what_has_no_classes(small: Small, cli: Cli) -> None:
    small("Scores", threshold={"top1": 0.5})
    done = quantized(cli)
    assert done.code == 1
    assert "the top-1 agreement cannot be judged: the output is no [n, classes]" in said(done)


# --- what is given


def test_a_dry_run_says_what_would_be_done(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusecli.commands.quantize.calibrated", None)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    done = quantized(cli, "--dry-run", "--report", "json=-", out="out.pt2")
    found = done.report["quantization"]
    assert (done.code, done.report["status"], done.report["output"]) == (0, "planned", None)
    assert [unit["name"] for unit in found["units"]][:2] == ["stem.conv", "down.depthwise"]
    assert all(unit["sqnr"] is None for unit in found["units"])
    assert "calibrates on 128 samples of calibration.safetensors:images" in done.report["next_step"]
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


RANDOM = {"shape": [4, 5]}


@pytest.mark.parametrize("threshold", [{}, {"cosine": 0.01}, {"sqnr": 1, "top1": 0.1}, {"sqnr": 200}])
def test_random_numbers_calibrate_nothing(small: Small, cli: Cli, threshold: dict[str, float]) -> None:
    """Whatever is asked for: what is measured on noise decides nothing, and no advice leads around that."""
    small("Plain", RANDOM, threshold=threshold)
    done = quantized(cli, "--report", "json=-")
    (entry,) = (entry for entry in done.report["ledger"] if entry["kind"] == "calibration")
    assert (done.code, "random numbers calibrate nothing" in entry["what"]) == (6, True)
    assert "it is calibrated on 4 random inputs" in done.report["problems"][0]
    assert "give a file of real inputs" in done.report["next_step"]
    assert "threshold" not in done.report["next_step"]
    assert nothing_at("o.safetensors")
    dry = quantized(cli, "--dry-run")
    assert (dry.code, "this writes nothing: it is calibrated on 4 random inputs" in said(dry)) == (0, True)


def test_noise_judges_nothing(small: Small, cli: Cli) -> None:
    small("Plain", calibrate=[data_of("x")])
    assert quantized(cli).code == 0
    small("Plain", RANDOM, calibrate=[data_of("x")])
    done = quantized(cli, "--report", "json=-", out="p.safetensors")
    assert (done.code, "it is judged on 4 random inputs" in done.report["problems"][0]) == (6, True)
    assert not [entry for entry in done.report["ledger"] if entry["kind"] == "calibration"]
    assert nothing_at("p.safetensors")
    assert verified(cli, "o.safetensors").code == 6


SAME = "calibrated and judged on the same data (70 samples of data.safetensors:x)"


@pytest.mark.parametrize("calibrate", [[], [data_of("x")]])
def test_data_that_calibrate_and_judge_are_said_to_be_the_same(
    small: Small, cli: Cli, calibrate: list[Any]
) -> None:
    small(calibrate=calibrate)
    done = quantized(cli)
    assert (done.code, SAME in said(done)) == (0, True)
    assert SAME in said(verified(cli, "o.safetensors"))


def test_data_of_their_own_are_not_said_to_be_the_same(shared: Path) -> None:
    assert "on the same data" not in (shared / "terminal.txt").read_text()
    assert "on the same data" not in (shared / "r.json").read_text()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (data_of("x", labels="short"), "[5] labels for 70 samples"),
        (data_of("x", labels="table"), "[7, 3] labels for 70 samples"),
        (data_of("x", labels="missing"), "data.safetensors has no tensor 'missing'"),
        (data_of("x", labels="half"), "the labels are float32, and no classes"),
        (data_of("x", labels="text"), "the labels are bool, and no classes"),
        (data_of("x", labels="ten"), "the labels go from 0 to 9, and the model has 3 classes"),
        (data_of("x", labels="minus"), "the labels go from -1 to 1, and the model has 3 classes"),
        ({"shape": [4, 5], "labels": "label"}, "labels belong to an input that is read from a file"),
        (data_of("nan"), "it has values that are not finite"),
        (data_of("none"), "there are no samples in it"),
        (data_of("image"), "the model does not run on these inputs: RuntimeError"),
        ({"shape": [4, 5], "dtype": "float64"}, "the model does not run on these inputs: RuntimeError"),
    ],
)
def test_inputs_that_cannot_be(
    small: Small, cli: Cli, temporary: Path, entry: dict[str, Any], message: str
) -> None:
    small("Plain", entry)
    for words in ([], ["--dry-run"]):
        done = quantized(cli, *words)
        assert (done.code, message in done.err) == (2, True)
    assert nothing_at("o.safetensors")


def test_labels_of_a_model_without_scores(small: Small, cli: Cli) -> None:
    small("Scores", data_of("x", labels="label"))
    done = quantized(cli)
    assert (done.code, "the model gives no scores [n, classes]" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("nan", "it has values that are not finite"),
        ("none", "there are no samples in it"),
        ("gone", "data.safetensors has no tensor 'gone'"),
        ("x", "the model does not run on these inputs"),
        ("wide", "the model does not run on these inputs: AssertionError: Guard failed"),
    ],
)
def test_calibration_that_cannot_be(small: Small, cli: Cli, temporary: Path, key: str, message: str) -> None:
    small("Norms", data_of("image"), calibrate=[data_of(key)])
    done = quantized(cli)
    assert (done.code, message in done.err) == (2, True)
    assert nothing_at("o.safetensors")


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        ("Branches", "Branches: the model cannot be exported: "),
        ("Random", "Random: the exported graph gives other outputs than the model on the same input"),
        ("Smooth", "nothing in the model can be quantized"),
    ],
)
def test_models_that_cannot_be_quantized(
    small: Small, cli: Cli, temporary: Path, cls: str, message: str
) -> None:
    small(cls)
    for words in ([], ["--dry-run"]):
        done = quantized(cli, *words)
        assert (done.code, message in done.err, len(done.err.strip().splitlines())) == (2, True, 2)
    assert nothing_at("o.safetensors")


def test_samples_are_split_by_rows_and_what_has_none_is_the_same_for_all(small: Small, cli: Cli) -> None:
    inputs = [data_of("x"), data_of("table"), data_of("scale", name="scale")]
    small("Several", *inputs, batch=32)
    done = quantized(cli, "--report", "json=-")
    assert (done.code, done.report["quantization"]["samples"]) == (0, 3)
    assert verified(cli, "o.safetensors").code == 0
    small("Several", *inputs, batch=70)
    assert (
        quantized(cli, "--report", "json=-", out="whole.safetensors").report["quantization"]["samples"] == 1
    )
    one, other = load_file("o.safetensors"), load_file("whole.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("out", ["o.pt2", "o.safetensors"])
def test_a_norm_that_no_layer_takes_stays_float(small: Small, cli: Cli, out: str) -> None:
    small("Norms", data_of("image"))
    done = quantized(cli, "--report", "json=-", out=out)
    assert done.code == 0
    reasons = [one["reason"] for one in done.report["quantization"]["left"]]
    assert "a batch norm that was not folded into a layer: fold it first, then quantize" in reasons
    assert verified(cli, out, "--allow-pickle").code == 0


def test_without_norms_there_is_nothing_to_fold(small: Small, cli: Cli) -> None:
    small()
    done = quantized(cli, "--report", "json=-")
    assert (done.code, done.report["groups"], done.report["problems"]) == (0, [], [])


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"groups": [["stem.conv", "down.bn"]]}, 4, "refused"),
        ({"groups": [["stem.conv", "nope"]]}, 2, "no module is named 'nope'"),
        ({"model": None}, 2, "int8 needs the model's code, which is exported"),
        ({"inputs": None}, 2, "no inputs to run it on"),
    ],
)
def test_folds_and_models_that_are_wrong(
    folder: Path, cli: Cli, temporary: Path, changes: dict[str, Any], code: int, message: str
) -> None:
    spec_with(**changes)
    done = quantized(cli)
    assert (done.code, message in said(done)) == (code, True)
    assert nothing_at("o.safetensors")


@pytest.mark.parametrize("changes", [{"groups": None}, {"qat": True}])
def test_what_is_folded_is_the_same_with_and_without_groups(
    folder: Path, cli: Cli, changes: dict[str, Any]
) -> None:
    spec_with(**changes)
    assert quantized(cli).code == 0
    mine, theirs = load_file("o.safetensors"), load_file("out.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_code_runs_with_consent_only(digits: Path, cli: Cli) -> None:
    for file in SUITES:
        shutil.copy(DIGITS / file, digits)
    done = cli("quantize", "model.pt", "--spec", "quantize.yaml")
    assert (done.code, "--allow-code net.py" in done.err) == (3, True)


@pytest.mark.parametrize("name", ["out.pt2", "out.safetensors"])
def test_what_is_int8_already(folder: Path, cli: Cli, name: str) -> None:
    done = quantized(cli, checkpoint=name)
    assert (done.code, "is int8 already" in done.err) == (2, True)
    assert cli("fuse", name, "--spec", "fuse.yaml", *ALLOW, "-o", "o.safetensors").code in (2, 3)
    with pytest.raises((fusecli.errors.UsageError, fusecli.errors.UnsafeError), match=name):
        fusecli.load_fused(DigitsNet(), name)
    assert nothing_at("o.safetensors")


def test_what_was_folded_before(folder: Path, cli: Cli) -> None:
    groups = [["stem.conv", "stem.bn"], ["up.conv", "up.bn"], ["head.linear", "head.bn"]]
    groups += [["down.depthwise", "down.bn"], ["blocks.*.conv", "blocks.*.bn"]]
    spec_with(groups=groups)
    assert cli("fuse", "model.pt", *WORDS, "-o", "fused.safetensors").code == 0
    assert quantized(cli, checkpoint="fused.safetensors").code == 0
    mine, theirs = load_file("o.safetensors"), load_file("out.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert cli("verify", "fused.safetensors", "o.safetensors", *WORDS).code == 0


# --- trained scales


@pytest.mark.parametrize("layout", ["fused", "prepared", "per-tensor", "fx"])
def test_learned_scales_are_those_of_the_file(folder: Path, cli: Cli, layout: str) -> None:
    state = torch_ao_qat.MAKERS[layout]().state
    torch.save({"model_state_dict": state}, "model.pt")
    # Trained for a few steps on noise, its classes hardly differ from image to image, and not at all in int8.
    spec_with({"threshold": {"cosine": 0.5, "whole": True}})
    assert quantized(cli, "--observer", "histogram").code == 0
    stored = load_file("o.safetensors")
    learned = {key.split(".weight_fake_quant.")[0]: key for key in state if key.endswith("fake_quant.scale")}
    assert bool(learned) == (layout != "fused")
    for layer, key in learned.items():
        scale = stored[f"{layer}.weight.scale"]
        assert torch.equal(scale, state[key].detach().expand(scale.shape))
    ends = {"stem.conv": "stem.conv", "down.depthwise": "down.act", "head.classifier": "head.classifier"}
    for unit, module in ends.items() if layout in ("prepared", "per-tensor") else ():
        key = f"{module}.activation_post_process.scale"
        assert torch.equal(stored[f"{unit}.output.scale"], state[key].detach().reshape(()))
    if layout == "prepared":
        assert verified(cli, "o.safetensors").code == 0


def test_equalizing_would_lose_what_was_learned(folder: Path, cli: Cli) -> None:
    torch.save({"model_state_dict": torch_ao_qat.prepared().state}, "model.pt")
    done = quantized(cli, "--equalize")
    assert (done.code, "equalize changes the weights that scales were learned for" in done.err) == (2, True)


# --- verify


@pytest.mark.parametrize("name", ["out.pt2", "out.safetensors"])
def test_verify_measures_the_same(folder: Path, cli: Cli, name: str) -> None:
    done = verified(cli, name, "--allow-pickle", "--report", "json=-")
    made = json.loads(Path("r.json").read_text())["quantization"]
    assert (done.code, done.report["status"]) == (0, "verified")
    found = done.report["quantization"]
    for key in ("units", "left", "options", "sqnr", "cosine", "worst_cosine", "top1", "accuracy", "asked"):
        assert found[key] == made[key], key


def test_an_archive_needs_consent(folder: Path, cli: Cli) -> None:
    done = verified(cli, "out.pt2")
    assert (done.code, "add --allow-pickle if you trust it" in done.err) == (3, True)
    done = cli("verify", "model.pt", "out.pt2")
    assert (done.code, "give --spec, or --model and --input" in done.err) == (2, True)


def test_thresholds_decide_again(folder: Path, cli: Cli) -> None:
    spec_with({"threshold": {"sqnr": 60}})
    done = verified(cli, "out.safetensors")
    assert (done.code, "at least 60 dB was asked for" in said(done)) == (1, True)
    spec_with({"threshold": {}})
    done = verified(cli, "out.safetensors")
    assert (done.code, "add quantize: {threshold" in said(done)) == (6, True)
    assert "--threshold" not in said(done)  # verify has no such option


def one_more(tensor: Tensor) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[0] += 1
    return changed


ROUNDED = "it does not hold the float model's numbers, rounded: {}"
SCALED = "calibration on 128 samples of calibration.safetensors:images does not give its scales: {}"


@pytest.mark.parametrize(
    ("name", "change", "problems"),
    [
        ("up.conv.weight", one_more, [ROUNDED.format("up.conv.weight")]),
        (
            "up.conv.weight.scale",
            lambda scale: scale * 1.01,
            [ROUNDED.format("up.conv.weight"), SCALED.format("up.conv.weight.scale")],
        ),
        ("up.conv.bias", lambda bias: bias + 1e-4, [ROUNDED.format("up.conv.bias")]),
        ("up.conv.output.scale", lambda scale: scale * 2, [SCALED.format("up.conv.output.scale")]),
    ],
)
def test_verify_sees_a_number_that_no_threshold_sees(
    folder: Path, cli: Cli, name: str, change: Callable[[Tensor], Tensor], problems: list[str]
) -> None:
    tensors, text = load_file("out.safetensors"), json.dumps(facts())
    tensors[name] = change(tensors[name])
    save_file(tensors, "bad.safetensors", {"fusecli": text})
    done = verified(cli, "bad.safetensors", "--report", "json=-")
    assert (done.code, done.report["problems"]) == (1, problems)
    assert done.report["quantization"]["cosine"] > 0.98


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {"stem.conv.weight": t["stem.conv.weight"].float()},
            "int8 (32, 1, 3, 3) belongs here",
        ),
        (
            lambda t: t | {"stem.conv.weight.scale": t["stem.conv.bias"][:3].clone()},
            "no scale and zero point",
        ),
        (
            lambda t: t | {"stem.conv.output.scale": torch.tensor(float("nan"))},
            "no scale and zero point of it",
        ),
        (lambda t: t | {"other.weight": torch.ones(2)}, "other.weight: nothing of the model is called so"),
        (lambda t: {k: v for k, v in t.items() if k != "up.conv.bias"}, "up.conv.bias: it is missing"),
    ],
)
def test_tensors_that_do_not_belong(
    folder: Path, cli: Cli, change: Callable[[Any], Any], message: str
) -> None:
    save_file(change(load_file("out.safetensors")), "bad.safetensors", {"fusecli": json.dumps(facts())})
    done = verified(cli, "bad.safetensors")
    assert (done.code, message in done.err) == (2, True)


def test_what_other_data_calibrated_is_claimed(folder: Path, cli: Cli) -> None:
    """Its numbers cannot be computed again: no fault of the file, and no proof."""
    spec_with({"calibrate": [{"file": "heldout.safetensors", "key": "images"}]})
    done = verified(cli, "out.safetensors", "--report", "json=-")
    assert (done.code, done.report["status"]) == (6, "inconclusive")
    (problem,) = done.report["problems"]
    assert problem.endswith("it says that it had other data, so they are claimed only")
    assert "give calibrate the data that it was made with" in done.report["next_step"]
    without_digest = {k: v for k, v in facts().items() if k != "calibration_sha256"}
    save_file(load_file("out.safetensors"), "old.safetensors", {"fusecli": json.dumps(without_digest)})
    assert verified(cli, "old.safetensors").code == 1


def test_weights_need_no_calibration_to_be_wrong(folder: Path, cli: Cli) -> None:
    tensors, text = load_file("out.safetensors"), json.dumps({**facts(), "calibration_sha256": "0" * 64})
    for name, change in (
        ("up.conv.weight.scale", lambda scale: scale * 1.0001),
        ("up.conv.weight", one_more),
    ):
        save_file({**tensors, name: change(tensors[name])}, "bad.safetensors", {"fusecli": text})
        assert verified(cli, "bad.safetensors").code == 1


@pytest.mark.parametrize("part", ["scale", "zero_point"])
def test_values_that_share_a_scale_have_one(small: Small, cli: Cli, part: str) -> None:
    """Of the numbers of one scale all are stored, and another program may read any of them."""
    small("Pooled", data_of("image"))
    assert quantized(cli).code == 0
    tensors = load_file("o.safetensors")
    shared = [name for name in tensors if name.endswith(f".output.{part}") and not name.startswith("x.")]
    assert len(shared) > 1
    for name in shared:
        more = torch.ones((), dtype=tensors[name].dtype)
        save_file(
            {**tensors, name: tensors[name] + more},
            "bad.safetensors",
            {"fusecli": json.dumps(facts("o.safetensors"))},
        )
        assert verified(cli, "bad.safetensors").code in (1, 2), name


def test_another_checkpoint(folder: Path, cli: Cli) -> None:
    content = torch.load("model.pt", weights_only=True)
    content["model_state_dict"]["head.classifier.weight"][0, 0] += 0.5
    torch.save(content, "model.pt")
    done = verified(cli, "out.safetensors", "--report", "json=-")
    assert (done.code, done.report["status"]) == (1, "different")
    assert "head.classifier.weight" in done.report["problems"][0]
    assert "is not the file that the int8 model was made from (sha256)" in str(done.report["ledger"])


def test_another_spec(folder: Path, cli: Cli) -> None:
    spec_with(groups=[["stem.conv", "stem.bn"]], no_rules=["linear_bn"])
    done = verified(cli, "out.safetensors")
    assert (done.code, "verify it with the spec that it was made with" in done.err) == (2, True)


def without(name: str) -> Callable[[Any], Any]:
    return lambda said: {key: value for key, value in said.items() if key != name}


def inside(**changes: Any) -> Callable[[Any], Any]:
    return lambda said: {**said, "int8": {**said["int8"], **changes}}


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "no int8": without("int8"),
    "a number for units": inside(units=5),
    "more options": inside(options={"threshold": {}}),
    "an observer of its own": inside(options={"observer": "\x1b[31m", "weights": "per-channel"}),
    "version 2": lambda said: {**said, "version": 2},
    "another version inside": inside(version=2),
    "no ops inside": inside(ops=None),
    "fewer units": inside(units=[]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_facts_that_are_damaged(folder: Path, cli: Cli, damage: Callable[[Any], Any]) -> None:
    save_file(load_file("out.safetensors"), "bad.safetensors", {"fusecli": json.dumps(damage(facts()))})
    done = verified(cli, "bad.safetensors")
    assert done.code in (2, 3)
    assert "bad.safetensors" in done.err or "quantized" in done.err or "int8" in done.err
    assert "\x1b" not in done.err


def rewritten(change: Callable[[bytes], bytes]) -> None:
    """bad.pt2: out.pt2 with other facts."""
    with zipfile.ZipFile("out.pt2") as old, zipfile.ZipFile("bad.pt2", "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(
                entry.filename, change(data) if entry.filename.endswith(int8_facts.PT2_FACTS) else data
            )


def other_ops(ops: Callable[[list[str]], list[str]]) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps({**json.loads(data), "ops": ops(json.loads(data)["ops"])}).encode()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"\xff\xfe" + data,
        lambda data: b"[" * 100_000,
        lambda data: data[:100],
        lambda data: data.replace(b'"version":1', b'"version":2'),
        other_ops(lambda ops: ops[::-1]),
        other_ops(lambda ops: ops[1:]),
        other_ops(lambda ops: ["relu"] * len(ops)),
        other_ops(lambda ops: []),
    ],
)
def test_facts_of_an_archive_that_are_damaged(
    folder: Path, cli: Cli, change: Callable[[bytes], bytes]
) -> None:
    rewritten(change)
    done = verified(cli, "bad.pt2", "--allow-pickle")
    assert (done.code in (2, 3), "bad.pt2" in done.err) == (True, True)


def test_an_archive_that_was_cut_off(folder: Path, cli: Cli) -> None:
    Path("bad.pt2").write_bytes(Path("out.pt2").read_bytes()[:3000])
    assert verified(cli, "bad.pt2", "--allow-pickle").code == 3


# --- equalize, correct biases


def spoiled(folder: Path) -> None:
    """The digits with channels of the head that differ by powers of ten, and compute the same."""
    content = torch.load("model.pt", weights_only=True)
    state = content["model_state_dict"]
    factors = 10 ** torch.empty(32).uniform_(-1.5, 1.5, generator=torch.Generator().manual_seed(0))
    for name in ("head.bn.weight", "head.bn.bias"):
        state[name] *= factors
    state["head.classifier.weight"] /= factors
    torch.save(content, "model.pt")


def test_equalizing_is_exact_and_helps_where_channels_differ(folder: Path, cli: Cli) -> None:
    spoiled(folder)
    words = ["--weights", "per-tensor", "--threshold", "cosine=0.1", "--report", "json=-"]
    plain = quantized(cli, *words).report["quantization"]
    done = quantized(cli, "--equalize", *words)
    equal = done.report["quantization"]
    assert (plain["exact"], equal["exact"]) == (None, 0.0)
    pair = next(pair for pair in equal["equalized"] if pair["second"] == "linear_1")
    assert pair["rows_after"] < 10 < pair["rows_before"]
    assert equal["sqnr"] > plain["sqnr"] + 3
    assert verified(cli, "o.safetensors").code == 0
    assert facts("o.safetensors")["equalize"] is True


def test_corrected_biases_are_accepted(folder: Path, cli: Cli) -> None:
    assert quantized(cli, "--correct-bias").code == 0
    mine, theirs = load_file("o.safetensors"), load_file("out.safetensors")
    changed = {name for name in mine if not torch.equal(mine[name], theirs[name])}
    assert changed == {name for name in mine if name.endswith(".bias")}
    done = verified(cli, "o.safetensors", "--report", "json=-")
    assert (done.code, done.report["quantization"]["options"]["biases corrected"]) == (0, "yes")


def test_biases_are_not_excused_by_saying_that_they_were_corrected(folder: Path, cli: Cli) -> None:
    text = json.dumps({**facts(), "correct_bias": True})
    save_file(load_file("out.safetensors"), "bad.safetensors", {"fusecli": text})
    done = verified(cli, "bad.safetensors", "--report", "json=-")
    said = (
        "correction on 128 samples of calibration.safetensors:images does not give its biases: stem.conv.bias"
    )
    assert (done.code, done.report["problems"][0].startswith(said)) == (1, True)


HAZARDOUS = """
from collections import OrderedDict
from torch import nn

def build():
    layers, width = [], 3
    for n in range(5):
        layers += [(f"conv{n}", nn.Conv2d(width, 16, 3, padding=1)), (f"bn{n}", nn.BatchNorm2d(16)),
                   (f"relu{n}", nn.ReLU())]
        width = 16
    return nn.Sequential(OrderedDict(layers))
"""


def test_the_forecast_names_the_layers_that_lose_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(HAZARDOUS)
    names: dict[str, Any] = {"__name__": "net"}
    exec(compile(HAZARDOUS, "net.py", "exec"), names)
    torch.manual_seed(0)
    net: nn.Module = names["build"]()
    for index in (1, 3):
        gamma = 10 ** torch.linspace(-3, 0, 16)[torch.randperm(16)]
        net.get_submodule(f"bn{index}").weight.data.copy_(gamma)
    torch.save(net.state_dict(), "model.pt")
    save_file({"x": torch.randn(64, 3, 8, 8)}, "x.safetensors")
    spec = {"version": 1, "model": {"factory": "net.py:build"}, "discover": True}
    spec |= {"inputs": [{"file": "x.safetensors", "key": "x"}], "quantize": {"weights": "per-tensor"}}
    Path("quantize.yaml").write_text(json.dumps(spec))
    found = quantized(cli, "--threshold", "cosine=0.1", "--report", "json=-").report["quantization"]
    forecast = sorted(found["units"], key=lambda unit: -unit["weight_range"])
    assert {unit["name"] for unit in forecast[:2]} == {"conv1", "conv3"}
    assert forecast[1]["weight_range"] > 100 > forecast[2]["weight_range"]


def test_verify_takes_a_typed_threshold(folder: Path, cli: Cli) -> None:
    assert verified(cli, "out.safetensors", "--threshold", "sqnr=90").code == 1
    assert verified(cli, "out.safetensors", "--threshold", "sqnr=20").code == 0


def test_no_report_takes_the_place_of_the_calibration(folder: Path, cli: Cli) -> None:
    before = Path("calibration.safetensors").read_bytes()
    done = verified(cli, "out.safetensors", "--report", "json=calibration.safetensors")
    assert (done.code, Path("calibration.safetensors").read_bytes() == before) == (2, True)


def test_equalisation_that_is_not_exact_is_refused(
    folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fusecli.commands.quantize.unequal", lambda *_: 1e-6)
    done = quantized(cli, "--equalize")
    assert (done.code, "equalisation is off by 1.0e-06 in float64" in said(done)) == (2, True)


def test_without_torchao_no_work_is_begun(folder: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise fusecli.errors.UsageError("quantizing needs torchao")

    monkeypatch.setattr("fusecli.commands.quantize.flow", missing)
    monkeypatch.setattr("fusecli.commands.quantize.floats_of", None)
    done = quantized(cli)
    assert (done.code, "quantizing needs torchao" in done.err) == (2, True)
