"""Batches and labels, and what an int8 file may say of itself."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fusecli.checkpoint import open_checkpoint
from fusecli.commands import batches, int8_facts
from fusecli.commands.fuse import protected
from fusecli.errors import UnsafeError, UsageError
from fusecli.spec import Spec
from fusecli.spec.load import spec_from_mapping

FACTS: dict[str, Any] = {
    "version": 1,
    "mode": "int8",
    "input_sha256": "5f" * 32,
    "versions": {"torch": "2"},
    "equalize": False,
    "correct_bias": True,
    "ops": ["conv2d", "relu"],
    "int8": {
        "version": 1,
        "options": {"observer": "minmax", "weights": "per-tensor"},
        "ops": "0b" * 32,
        "units": [{"name": "conv", "nodes": ["conv2d", "relu"]}],
    },
}


def facts_of(path: Path) -> dict[str, Any] | None:
    """What `verify` finds in the file: it looks into an archive, and opens what is none."""
    if int8_facts.is_archive(path) or not path.exists() or path.suffix == ".pt2":
        return int8_facts.facts_inside(path)
    with open_checkpoint(path) as artifact:
        return int8_facts.facts_in(artifact)


def archive(path: Path, data: bytes, name: str = "out/extra/fusecli.json") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, data)
    return path


def written(folder: Path, said: Any, fmt: str) -> Path:
    if fmt == "pt2":
        return archive(folder / "x.pt2", json.dumps(said).encode())
    save_file({"w": torch.zeros(1)}, folder / "x.safetensors", {"fusecli": json.dumps(said)})
    return folder / "x.safetensors"


def changed(*path: str, to: Any) -> Any:
    said = copy.deepcopy(FACTS)
    place = said
    for key in path[:-1]:
        place = place[key]
    if to is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return said


@pytest.mark.parametrize("fmt", ["pt2", "safetensors"])
def test_what_was_written_is_read(tmp_path: Path, fmt: str) -> None:
    path = written(tmp_path, FACTS, fmt)
    assert facts_of(path) == FACTS
    assert int8_facts.is_archive(path) == (fmt == "pt2")


@pytest.mark.parametrize("fmt", ["pt2", "safetensors"])
@pytest.mark.parametrize("mode", ["folded", "qat", 1, None, []])
def test_other_files_say_nothing(tmp_path: Path, fmt: str, mode: Any) -> None:
    assert facts_of(written(tmp_path, changed("mode", to=mode), fmt)) is None


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 100_000, b"{", b"[]", b"3", b"null"])
def test_what_cannot_be_read_says_nothing(tmp_path: Path, data: bytes) -> None:
    assert facts_of(archive(tmp_path / "x.pt2", data)) is None


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "x.pt2", json.dumps({**FACTS, "more": "0" * 10_000}).encode())
    assert facts_of(path) is not None
    monkeypatch.setattr(int8_facts, "_MOST_FACTS", 10_000)
    assert facts_of(path) is None


def test_files_that_are_none(tmp_path: Path) -> None:
    assert facts_of(tmp_path / "gone.pt2") is None
    (tmp_path / "x.pt2").write_bytes(b"PK\x03\x04 and no more")
    assert facts_of(tmp_path / "x.pt2") is None
    assert facts_of(archive(tmp_path / "y.pt2", json.dumps(FACTS).encode(), "other.json")) is None


TYPES = (5, "x", [], {}, None, [1], {"a": 1}, True, KeyError)
DAMAGES = [
    *((("equalize",), to) for to in TYPES if to is not True),
    *((("correct_bias",), to) for to in TYPES if to is not True),
    *((("input_sha256",), to) for to in (*TYPES, "5f" * 31, "5F" * 32)),
    *((("ops",), to) for to in TYPES if to != []),
    *((("int8",), to) for to in TYPES),
    *((("int8", "options"), to) for to in (*TYPES, {"observer": "minmax"}, {"threshold": {}})),
    (("int8", "options", "threshold"), {"cosine": 0}),
    *((("int8", "options", "observer"), to) for to in (*TYPES, "\x1b[31m")),
    *((("int8", "options", "weights"), to) for to in TYPES),
    *((("int8", "units"), to) for to in (*TYPES, [{}], [{"nodes": 1}], [{"nodes": [1]}]) if to != []),
]


@pytest.mark.parametrize("fmt", ["pt2", "safetensors"])
def test_facts_of_other_types_are_damage(tmp_path: Path, fmt: str) -> None:
    for path, to in DAMAGES:
        file = written(tmp_path, changed(*path, to=to), fmt)
        with pytest.raises(UnsafeError, match="what it says of itself is damaged"):
            facts_of(file)


@pytest.mark.parametrize("version", [0, 2, True, "1", None, [1], 1.0])
def test_another_version(tmp_path: Path, version: Any) -> None:
    file = written(tmp_path, changed("version", to=version), "pt2")
    with pytest.raises(UnsafeError, match="this fusecli reads 1"):
        facts_of(file)


# --- batches


@pytest.fixture
def given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Spec]:
    monkeypatch.chdir(tmp_path)
    tensors = {"x": torch.arange(70.0).view(35, 2), "table": torch.ones(7, 2), "one": torch.tensor(3.0)}
    tensors |= {"label": torch.arange(35), "mask": torch.ones(35, 1)}
    save_file(tensors, "d.safetensors")

    def spec(*inputs: dict[str, Any], **quantize: Any) -> Spec:
        return spec_from_mapping({"version": 1, "inputs": list(inputs), "quantize": quantize})

    return spec


def data(key: str, **more: str) -> dict[str, str]:
    return {"file": "d.safetensors", "key": key, **more}


@pytest.mark.parametrize(("batch", "sizes"), [(10, [10, 10, 10, 5]), (35, [35]), (100, [35]), (1, [1] * 35)])
def test_rows_are_split(given: Callable[..., Spec], batch: int, sizes: list[int]) -> None:
    found = batches.evaluation(given(data("x"), data("mask", name="mask"), batch=batch), 0)
    assert [len(sample.args[0]) for sample in found.samples] == sizes
    assert [len(sample.kwargs["mask"]) for sample in found.samples] == sizes
    assert torch.equal(torch.cat([sample.args[0] for sample in found.samples]).flatten(), torch.arange(70.0))
    assert (found.said, found.random) == ("35 samples of d.safetensors:x, d.safetensors:mask", False)


def test_what_has_other_rows_is_the_same_for_all(given: Callable[..., Spec]) -> None:
    found = batches.evaluation(given(data("x"), data("table"), data("one"), batch=20), 0)
    assert [[len(sample.args[0]), len(sample.args[1])] for sample in found.samples] == [[20, 7], [15, 7]]
    assert all(float(sample.args[2]) == 3 for sample in found.samples)


def test_random_inputs_are_said_to_be_random(given: Callable[..., Spec]) -> None:
    found = batches.calibration(given({"shape": [3, 2]}), 0)
    assert (found.random, found.said, len(found.samples)) == (True, "4 random inputs", 4)
    assert [entry.kind for entry in batches.random_ledger(found)] == ["calibration"]
    assert batches.random_ledger(batches.calibration(given(data("x")), 0)) == []


def test_labels_of_a_file_beside_random_inputs_are_those_of_each_sample(given: Callable[..., Spec]) -> None:
    found = batches.evaluation(given(data("x", labels="label"), {"shape": [1, 2]}), 0)
    assert found.labels is not None
    assert torch.equal(found.labels, torch.arange(35).repeat(4))


def test_calibration_and_evaluation_have_files_of_their_own(given: Callable[..., Spec]) -> None:
    spec = given(data("x"), calibrate=[data("table")])
    assert batches.calibration(spec, 0).said == "7 samples of d.safetensors:table"
    assert batches.evaluation(spec, 0).said == "35 samples of d.safetensors:x"
    assert Path("d.safetensors") in [path.relative_to(Path.cwd()) for path in protected(spec)]


def test_an_error_says_which_of_both(given: Callable[..., Spec]) -> None:
    with pytest.raises(UsageError, match=r"quantize\.calibrate: \[7, 2\] labels for 35 samples"):
        batches.calibration(given(data("x"), calibrate=[data("x", labels="table")]), 0)


def test_the_fingerprint_is_that_of_the_batches(given: Callable[..., Spec]) -> None:
    def of(*inputs: dict[str, Any], **quantize: Any) -> str:
        return batches.fingerprint(batches.evaluation(given(*inputs, **quantize), 0).samples)

    assert of(data("x")) == of(data("x"))
    others = [of(data("mask")), of(data("x"), data("table")), of(data("x"), batch=10), of(data("one"))]
    assert len({of(data("x")), *others}) == 5
