"""Case 53: wrapper prefixes in any order, and tensors tagged cuda on a machine without one."""

from __future__ import annotations

import zipfile

import pytest
import torch
from safetensors.torch import save_file

from fusecli.checkpoint import open_checkpoint, write_pt
from fusecli.errors import UnsafeError, UsageError

KEYS = ("conv.weight", "conv.bias")


def opened(tmp_path, keys, strip_prefix=()):
    torch.save({key: torch.ones(2) * number for number, key in enumerate(keys)}, tmp_path / "m.pt")
    return open_checkpoint(tmp_path / "m.pt", strip_prefix=strip_prefix)


@pytest.mark.parametrize(
    ("prefix", "prefixes"),
    [
        ("", ()),
        ("module.", ("module.",)),
        ("_orig_mod.", ("_orig_mod.",)),
        ("module._orig_mod.", ("_orig_mod.", "module.")),
        ("_orig_mod.module.", ("_orig_mod.", "module.")),
        ("module.module.", ("module.", "module.")),
        ("_fsdp_wrapped_module.", ("_fsdp_wrapped_module.",)),
    ],
)
def test_known_prefixes(tmp_path, prefix, prefixes):
    with opened(tmp_path, [prefix + key for key in KEYS]) as checkpoint:
        assert tuple(checkpoint.tensors) == KEYS
        assert tuple(stored.name for stored in checkpoint.tensors.values()) == KEYS
        assert checkpoint.prefixes == prefixes
        assert all(any(prefix in notice for notice in checkpoint.notices) for prefix in prefixes)


def test_known_prefixes_of_safetensors(tmp_path):
    save_file({f"module.{key}": torch.ones(2) for key in KEYS}, tmp_path / "m.safetensors")
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert set(checkpoint.tensors) == set(KEYS)


def test_module_stays_where_only_some_keys_have_it(tmp_path):
    keys = ("module.weight", "head.weight")
    with opened(tmp_path, keys) as checkpoint:
        assert tuple(checkpoint.tensors) == keys


def test_wrappers_inside_a_name(tmp_path):
    keys = ("stem.weight", "block._orig_mod.weight", "tail._checkpoint_wrapped_module.weight")
    with opened(tmp_path, keys) as checkpoint:
        assert tuple(checkpoint.tensors) == ("stem.weight", "block.weight", "tail.weight")


def test_prefixes_of_the_spec(tmp_path):
    keys = ("module.model.module.a", "module.model.module.b")
    with opened(tmp_path, keys, ["model."]) as checkpoint:
        assert tuple(checkpoint.tensors) == ("a", "b")
        assert checkpoint.prefixes == ("module.", "model.", "module.")
    with opened(tmp_path, keys, ["module.", "model."]) as checkpoint:  # known ones may be listed too
        assert tuple(checkpoint.tensors) == ("a", "b")


def test_a_prefix_that_no_key_has(tmp_path):
    with pytest.raises(
        UsageError, match=r"no key begins with the prefix 'net.'.*keys look like 'conv.weight'"
    ):
        opened(tmp_path, KEYS, ["net."])


def test_names_never_collide(tmp_path):
    with pytest.raises(UnsafeError, match=r"'a' and 'net.a' would both be named 'a'"):
        opened(tmp_path, ("a", "net.a"), ["net."])


def test_a_module_keeps_its_own_names(tmp_path):
    outer = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 2)})
    torch.save(outer, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt", allow_pickle=True) as checkpoint:
        assert tuple(checkpoint.tensors) == ("module.weight", "module.bias")


def test_extra_state_follows_its_prefix(tmp_path):
    content = {"module.weight": torch.ones(2), "module._extra_state": 3}
    torch.save(content | {"module.bias": torch.ones(2)}, tmp_path / "m.pt")
    with open_checkpoint(tmp_path / "m.pt") as checkpoint:
        assert checkpoint.others == {"_extra_state": 3}


@pytest.mark.parametrize("legacy", [False, True])
def test_cuda_tags(tmp_path, legacy):
    content = {key: torch.arange(2.0) for key in KEYS}
    path = tmp_path / "m.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    tag_as_cuda(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.notices == ("2 tensor storages saved from cuda:0 were loaded on the CPU",)
        assert all(torch.equal(checkpoint.tensors[key].load(), content[key]) for key in KEYS)


def tag_as_cuda(path):
    """What torch.save writes on a machine with a GPU: the device is a string in the pickle."""
    cpu, cuda = b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    if not zipfile.is_zipfile(path):
        path.write_bytes(path.read_bytes().replace(cpu, cuda))
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if not name.endswith(".format_version"):  # it promises torch's own member offsets
                archive.writestr(name, data.replace(cpu, cuda) if name.endswith("data.pkl") else data)


def test_real_cuda_tags_and_float_counters(trained):
    with open_checkpoint(trained("learned_models", "mask/ACS-WFC-F606W.pth")) as checkpoint:
        text = " | ".join(checkpoint.notices)
        assert "46 tensor storages saved from cuda:0" in text
        assert "num_batches_tracked is a float in 6 places" in text
        assert "the prefix 'module.' was taken off" in text


def test_an_artifact_keeps_its_own_names(tmp_path):
    state, manifest = {"module.weight": torch.ones(2)}, {"fusecli": "{}"}
    save_file(state, tmp_path / "m.safetensors", metadata=manifest)
    write_pt(tmp_path / "m.pt", state, manifest)
    for name in ("m.safetensors", "m.pt"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert list(checkpoint.tensors) == ["module.weight"]
