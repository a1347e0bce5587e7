"""Case 54: hostile, foreign and damaged files end in one clear sentence, and nothing in them is executed."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fusecli.checkpoint import open_checkpoint
from fusecli.errors import ExitCode, UnsafeError, UsageError
from tests.torchscript import scripted

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3)}
LEGACY = {"_use_new_zipfile_serialization": False}


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(UnsafeError) as caught:
        open_checkpoint(path, **options)
    assert caught.value.exit_code == ExitCode.UNSAFE
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "\x1b" not in message
    assert len(message.removeprefix(str(path))) < 400
    assert "; " in message  # what, then the fix
    return message.removeprefix(f"{path}: ")


class Bomb:
    """Unpickling it touches a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["alone", "beside weights"])
@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle", "protocol 0", "protocol 4"])
def test_os_system_is_named_and_never_run(tmp_path, place, form):
    marker, path = tmp_path / "executed", tmp_path / "m.pt"
    content = Bomb(marker) if place == "alone" else {**WEIGHTS, "x": Bomb(marker)}
    if form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    elif form == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    elif form == "protocol 0":
        path.write_bytes(pickle.dumps(Bomb(marker), protocol=0))
    else:
        torch.save(content, path, pickle_protocol=4, **LEGACY)
    message = refusal(path)
    assert "posix.system" in message
    assert "--allow-pickle" not in message
    assert not marker.exists()


def test_the_bomb_of_these_tests_is_live(tmp_path):
    torch.save({**WEIGHTS, "x": Bomb(tmp_path / "executed")}, tmp_path / "m.pt")
    open_checkpoint(tmp_path / "m.pt", allow_pickle=True)
    assert (tmp_path / "executed").exists()


def test_a_bomb_in_the_part_of_a_legacy_file_that_comes_first(tmp_path):
    marker, path = tmp_path / "executed", tmp_path / "m.pt"
    torch.save(WEIGHTS, path, **LEGACY)
    whole = path.read_bytes()
    path.write_bytes(pickle.dumps(Bomb(marker), protocol=2) + whole)
    assert "posix.system" in refusal(path)
    magic = whole[: whole.index(b".") + 1]
    path.write_bytes(magic + pickle.dumps(Bomb(marker), protocol=2) + whole[len(magic) :])
    assert "posix.system" in refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_whole_module_names_its_class_and_the_way_out(tmp_path, options):
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "m.pt", **options)
    message = refusal(tmp_path / "m.pt")
    assert "whole pickled module (class torch.nn.modules.container.Sequential)" in message
    assert "state_dict" in message
    assert "--allow-pickle" in message
    assert "for a file you trust" in message


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_namespace_beside_the_weights(tmp_path, options):
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": WEIGHTS}, tmp_path / "m.pt", **options)
    assert "its pickle needs argparse.Namespace" in refusal(tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt", allow_pickle=True) as checkpoint:
        assert list(checkpoint.tensors) == ["weight"]


def test_builtins_are_named_in_full(tmp_path):
    class Evaluated:
        def __reduce__(self):
            return eval, ("1",)

    torch.save({"x": Evaluated()}, tmp_path / "m.pt")
    assert "would run builtins.eval" in refusal(tmp_path / "m.pt")


def test_a_plain_pickle(tmp_path):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps({"a": 1}))
    assert "plain pickle" in refusal(tmp_path / "m.pkl")


def test_torchscript(tmp_path):
    scripted(nn.Linear(2, 2)).save(tmp_path / "m.pt")
    for consent in (False, True):
        message = refusal(tmp_path / "m.pt", allow_pickle=consent)
        assert "TorchScript" in message
        assert "torch.jit.load(f).state_dict()" in message


def test_real_torchscript(trained):
    assert "TorchScript" in refusal(trained("silero_vad", "data/silero_vad.jit"))


@pytest.mark.filterwarnings("ignore")  # torch.export's own, while the test file is made
def test_export_archive(tmp_path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), tmp_path / "m.pt2")
    for consent in (False, True):
        assert "torch.export archive" in refusal(tmp_path / "m.pt2", allow_pickle=consent)


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    return buffer.getvalue()


def archive(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        packed.writestr(name, b"data")
    return buffer.getvalue()


FOREIGN = [
    (b"", "the file is empty"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    (b"\n <!DOCTYPE html><html><body>Not found</body></html>", "HTML"),
    (b"<html>404</html>", "HTML"),
    (b'{"error": "Entry not found"}', "JSON"),
    (b'{"weight_map": {}}', "JSON"),
    (b'{"weight_map": 3', "not valid JSON"),
    (b"[1, 2, 3, 4]", "no checkpoint of any known format"),
    (b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5"),
    (b"\x08\x07\x12\x07pytorch\x1a\x051.0.0:" + bytes(100), "ONNX"),
    (b"\x93NUMPY\x01\x00" + bytes(100), "NumPy"),
    (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
    (gzip.compress(b"x" * 100), "gzip"),
    (tar(), "tar archive"),
    (archive("arr_0.npy"), ".npz"),
    (archive("folder/model.pt"), "torch.save did not write"),
    (archive("code/data.pkl/"), "torch.save did not write"),
    (b"PK\x05\x06" + bytes(18), "torch.save did not write"),
    (bytes(4096), "zero bytes"),
    (b"\x80", "cut off"),
    (b"\x80\x02}q\x00(X\x09\x00\x00\x00", "cut off"),
    (b"hello there, this is a text file\n" * 9, "no checkpoint of any known format"),
    (bytes(range(97, 123)) * 40, "no checkpoint of any known format"),
]


@pytest.mark.parametrize(("content", "what"), FOREIGN, ids=[what for _, what in FOREIGN])
def test_foreign_files(tmp_path, content, what):
    (tmp_path / "m.pt").write_bytes(content)
    assert what in refusal(tmp_path / "m.pt")
    assert what in refusal(tmp_path / "m.pt", allow_pickle=True)


@pytest.mark.parametrize("save", [torch.save, save_file, lambda s, p: torch.save(s, p, **LEGACY)])
def test_a_file_cut_off_anywhere(tmp_path, save):
    path = tmp_path / "whole"
    save({"a": torch.arange(40.0), "b": torch.arange(3)}, path)
    whole = path.read_bytes()
    cut = tmp_path / "cut"
    for size in {1, 7, 9, 12, 60, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1}:
        cut.write_bytes(whole[:size])
        message = refusal(cut)
        assert any(word in message for word in ("cut off", "damaged", "not valid JSON")), (size, message)


def test_a_zip_whose_tensor_data_is_incomplete(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(WEIGHTS, path)
    repack(path, lambda name, data: data[:-4] if name.endswith("data/0") else data)
    assert "storage 0 is incomplete" in refusal(path)


def test_compressed_members(tmp_path):
    path = tmp_path / "m.pt"
    torch.save(WEIGHTS, path)
    repack(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def repack(path, change, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", compression) as packed:
        for name, data in members.items():
            packed.writestr(name, change(name, data))


def test_a_legacy_file_that_claims_a_huge_tensor_allocates_nothing(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.zeros(1000)}, path, **LEGACY)
    claim = path.read_bytes().replace(b"M\xe8\x03", b"\x8a\x06" + (10**13).to_bytes(6, "little"))
    path.write_bytes(claim)
    assert "cut off" in refusal(path)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "what"),
    [
        ({"a": F32, "b": {**F32, "data_offsets": [2, 6]}}, 8, "overlaps"),
        ({"a": F32, "b": F32}, 4, "overlaps"),
        ({"a": {**F32, "data_offsets": [4, 8]}}, 8, "gap"),
        ({"a": F32}, 8, "4 bytes follow"),
        ({"a": F32}, 3, "cut off"),
        ({"a": {**F32, "data_offsets": [0, 4 << 40], "shape": [1 << 40]}}, 4, "cut off"),
        ({"a": {**F32, "shape": [2]}}, 4, "do not fit"),
        ({"a": {**F32, "shape": [-1], "data_offsets": [4, 0]}}, 4, "malformed"),
        ({"a": {**F32, "shape": [True]}}, 4, "malformed"),
        ({"a": {**F32, "shape": "4"}}, 4, "malformed"),
        ({"a": {"dtype": "F32"}}, 4, "malformed"),
        ({"a": 5}, 4, "malformed"),
        ({"a": {**F32, "dtype": "F4"}}, 4, "unsupported dtype 'F4'"),
        ({"__metadata__": {"x": 1}, "a": F32}, 4, "metadata"),
        ([F32], 4, "malformed|not a JSON object|no checkpoint"),
    ],
)
def test_hostile_safetensors_headers(tmp_path, header, data, what):
    write_raw(tmp_path / "m", json.dumps(header).encode(), data)
    assert any(part in refusal(tmp_path / "m") for part in what.split("|"))


def write_raw(path: Path, header: bytes, data: int) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data))


def test_duplicate_and_deep_headers(tmp_path):
    entry = json.dumps(F32)
    write_raw(tmp_path / "m", f'{{"a": {entry}, "a": {entry}}}'.encode(), 4)
    assert "duplicate key 'a'" in refusal(tmp_path / "m")
    write_raw(tmp_path / "m", b'{"a":' * 100_000, 4)
    assert "not valid JSON" in refusal(tmp_path / "m")


@pytest.mark.parametrize("length", [100_000_001, 1 << 40, (1 << 64) - 1])
def test_oversized_headers(tmp_path, length):
    (tmp_path / "m").write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
    assert "oversized" in refusal(tmp_path / "m")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.empty(2, device="meta"),
        pytest.param(lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), id="quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch deprecates what it can still save
def test_tensors_that_are_not_plain(tmp_path, tensor):
    torch.save({"w": tensor() if callable(tensor) else tensor}, tmp_path / "m.pt")
    assert "not a plain dense tensor" in refusal(tmp_path / "m.pt")


def test_names_that_are_no_text(tmp_path):
    torch.save({"bad\ud800": torch.ones(1)}, tmp_path / "m.pt", pickle_protocol=2)
    refusal(tmp_path / "m.pt")


def test_no_file_at_all(tmp_path):
    for path in (tmp_path, tmp_path / "none.pt", Path(os.devnull), "nul\0byte"):
        with pytest.raises(UsageError) as caught:
            open_checkpoint(path)
        assert caught.value.exit_code == ExitCode.USAGE
