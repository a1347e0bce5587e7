"""The artifacts of the examples, to the byte: what fuse writes is the same from one version to the next.

Where one has to change, `python -m tests.test_artifacts` prints the table, and the commit says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import pytest
from safetensors import safe_open
from typer.testing import CliRunner

from fusecli import rules
from fusecli.cli.app import app
from fusecli.rewrite import MANIFEST_KEY

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {
    **{f"rules/{name}": (f"rules/{name}.safetensors", f"rules/{name}.yaml") for name in rules.names()},
    "mappings/custom_fuser": ("mappings/custom_fuser.safetensors", "mappings/custom_fuser.yaml"),
    "bare/state_dict": ("bare/state_dict.safetensors", "bare/state_dict.yaml"),
    "digits": ("digits/model.pt", "digits/fuse.yaml"),
    "digits, to be trained": ("digits/model.pt", "digits/qat.yaml"),
}
SHA256 = {
    "rules/bake": ("9e20e91115056220", "a3d89e34a66077cd"),
    "rules/bn_bn": ("dc1ae619f07ecfae", "a481014dd7ce35bd"),
    "rules/bn_conv": ("8fd2979edaaf2949", "96aabc3566e0669c"),
    "rules/bn_conv_border": ("f243e87089930f38", "a6f02b4344bf31d2"),
    "rules/bn_linear": ("1f3316c844b81f6f", "b57f6a49b61910b3"),
    "rules/bn_relu": ("6ad3b4cdfd6d9819", "012f7c38450d4bfc"),
    "rules/bn_with_activation": ("6ec2b01c80f3bfc4", "883103ca19107e63"),
    "rules/conv_bn": ("6ec2b01c80f3bfc4", "1bde66bcb37de684"),
    "rules/conv_bn_qat": ("8bb528dc9bfb0fd2", "26ad8e952444897a"),
    "rules/conv_bn_relu": ("3555f9090f9a48c7", "2a8ef82f223e67a6"),
    "rules/conv_bn_relu_qat": ("718c5fedb2e32f70", "eca19820de0a1458"),
    "rules/conv_relu": ("5c36d737fad39afa", "a0ed0d9da96dddd8"),
    "rules/conv_transpose_bn": ("f9adbceb5880e389", "33e3edeb39f4c2df"),
    "rules/gain_linear": ("b021d4cdbb91bec4", "50aa43e98a30788d"),
    "rules/idle": ("47cd6f7ab74ec8cf", "7ca5e3eeaec32a48"),
    "rules/layer_scale": ("ae7a9515fd69cc59", "d1d0eac3aa250944"),
    "rules/linear_bn": ("0b330e24e7e61069", "cc7a82071e55749b"),
    "rules/linear_bn_qat": ("66ba7a3e7787f43c", "3d48ea4c3ed64c32"),
    "rules/linear_bn_relu": ("9d5287f98641b7fb", "596a4b71aa5dde08"),
    "rules/linear_relu": ("161315b0f90291fa", "5f1124aa7273ba3d"),
    "rules/lora": ("88d2095e6ffc0d9a", "945e9ad7e79e4565"),
    "rules/parallel_layers": ("eaeaaba22fe284c5", "b120c9f0ff2c32a9"),
    "rules/parallel_norm": ("2ca61ec4539c67ef", "54c15ee82cf7d8ba"),
    "rules/pointwise_chain": ("7b153d6786c8a8cf", "ac5c975202d95dce"),
    "rules/scale_bn": ("e823d129e88d2be3", "dd98920c5b1178e5"),
    "rules/shared_layer_bn": ("7c858b6dd1a74320", "ea284bd40fc8e9b0"),
    "mappings/custom_fuser": ("b4c74ed4c7e23565", "821c67b1bdbbbf31"),
    "bare/state_dict": ("b4879afc33431437", "450feb741c8b6ba0"),
    "digits": ("cee715956d110911", "b45351353490ef21"),
    "digits, to be trained": ("f43f4827d90bc183", "ff3cf3ba68dc2926"),
}


def digests(example: str, folder: Path) -> tuple[str, str]:
    """Of the tensors in the order of the file, and of the manifest but for the versions that it names."""
    checkpoint, spec = EXAMPLES[example]
    out = folder / "fused.safetensors"
    words = ["fuse", f"configs/{checkpoint}", "--spec", f"configs/{spec}", "-o", str(out), "--force"]
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = out.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    with safe_open(out, "pt") as file:
        manifest = json.loads(file.metadata()[MANIFEST_KEY])
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    layout = [[name, found.get_dtype(), found.get_shape()] for name, found in slices.items()]
    del manifest["versions"]
    tensors = hashlib.sha256(json.dumps(layout).encode() + content[header:])
    said = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode())
    return tensors.hexdigest()[:16], said.hexdigest()[:16]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_artifact_is_the_same_to_the_byte(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("FUSECLI_ALLOW_CODE", raising=False)
    assert digests(example, tmp_path) == SHA256[example]


if __name__ == "__main__":
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as name:
        for each in EXAMPLES:
            print(f"    {each!r}: {digests(each, Path(name))!r},".replace("'", '"'))
