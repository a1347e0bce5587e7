"""`scripts/bench proof` and `scripts/bench memory`: what a proof costs in forwards and in memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

NETWORKS = (
    *("resnet50", "resnext50_32x4d", "seresnet50", "preresnet50", "densenet121", "bn_vgg16", "dla60"),
    *("xception", "inceptionv3", "efficientnet_b3", "regnetx032", "darknet53", "hrnet_w18_small_v2"),
    *("vovnet39", "selecsls60", "senet52", "cbam_resnet50", "bam_resnet50", "airnet50_1x64d_r2", "resnet101"),
)
LANGUAGE_MODEL = """
import torch
from torch import nn
from torch.nn import functional as F


class Norm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = Norm(width), Norm(width)
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.gate = nn.Linear(width, 3 * width, bias=False)
        self.up = nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x):
        y, (n, t, c) = self.norm1(x), x.shape
        q, k, v = (f(y).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, c)
        x = x + self.o(y)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Model(nn.Module):
    def __init__(self, width, layers=24, words=4096):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Block(width, width // 64) for _ in range(layers))
        self.norm, self.head = Norm(width), nn.Linear(width, words, bias=False)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))
"""
SIZES = {"small": 320, "medium": 896, "large": 3328}  # 74 MB, 516 MB and 7.0 GB


def timed(work: Callable[[], object], runs: int = 3) -> float:
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def forwards(names: Iterable[str] = NETWORKS) -> list[tuple[str, float, float]]:
    """Seconds of `fusecli.fuse(model, x, discover=True)` and of one forward, network by network."""
    import torch

    import fusecli
    from tests.zoo.networks import constructors, trained

    torch.set_num_threads(1)
    pair = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    fusecli.fuse(pair, torch.randn(1, 3, 8, 8), discover=True)  # what is imported once
    known, found = constructors(), []
    for name in names:
        model = trained(known[name]()).eval()
        x = torch.randn(1, 3, *getattr(model, "in_size", (224, 224)))
        with torch.no_grad():
            model(x)
            forward = timed(lambda: model(x))  # noqa: B023
        start = time.perf_counter()
        outcome = fusecli.fuse(model, x, discover=True)
        ours = time.perf_counter() - start
        assert outcome.status == "fused", (name, outcome.status)
        found.append((name, ours, forward))
        print(f"  {name:24} {ours:7.2f} s {forward * 1e3:7.0f} ms {ours / forward:6.1f} forwards", flush=True)
    return found


def milliseconds_a_group(groups: int) -> float:
    """Of `fusecli.fuse` of so many Linear + BatchNorm1d + ReLU of 8 channels."""
    import torch
    from torch import nn

    import fusecli
    from tests.zoo.networks import trained

    layers = (layer for _ in range(groups) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()))
    model = trained(nn.Sequential(*layers)).eval()
    x = torch.randn(4, 8)
    return timed(lambda: fusecli.fuse(model, x, discover=True)) / groups * 1e3


def cpu_of_digits(root: Path) -> float:
    """Seconds of `fusecli fuse` of the digits network of the README, above those of `import torch`."""
    example = root / "configs" / "digits"
    fusecli = str(Path(sys.executable).parent / "fusecli")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in example.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        command = [fusecli, "fuse", "model.pt", "--spec", "fuse.yaml", "--allow-code", "net.py"]
        ours = min(peak([*command, "--force"], folder)[1] for _ in range(3))
        torch_alone = min(peak([sys.executable, "-c", "import torch"], folder)[1] for _ in range(3))
    return ours - torch_alone


def write_language_model(folder: Path, width: int) -> int:
    """A bfloat16 model of 24 layers with its code and a spec; its bytes."""
    import torch
    from safetensors.torch import save_file

    (folder / "lm.py").write_text(LANGUAGE_MODEL)
    sys.path.insert(0, str(folder))
    from lm import Model  # type: ignore[import-not-found]

    with torch.device("meta"):
        model: Any = Model(width)
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str, tensor: Any) -> Any:
        gain = tensor.ndim == 1
        values = torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(generator=generator)
        return values.mul_(0.3).add_(1) if gain else values.mul_(tensor.shape[-1] ** -0.5)

    path = folder / "lm.safetensors"
    save_file({name: drawn(name, tensor) for name, tensor in model.state_dict().items()}, path)
    (folder / "fuse.yaml").write_text(
        f"version: 1\nmodel: {{factory: 'lm.py:Model', kwargs: {{width: {width}}}}}\n"
        "inputs: [{shape: [1, 16], dtype: int64, range: [0, 4095]}]\ndiscover: true\n"
    )
    return path.stat().st_size


def peak(command: list[str], folder: Path) -> tuple[float, float, str]:
    """Bytes of memory of its own that a process had at most (mapped files are not its own), its seconds of
    CPU, and what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "out.txt").open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
    most = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines() if status.exists() else ()
        own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
        most = max(most, own)
        time.sleep(0.01)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return most, seconds, (folder / "out.txt").read_text()


def memory(sizes: Iterable[str]) -> list[tuple[str, int, float, float]]:
    """For each size the bytes of the file, the peak above `import torch` and the seconds of CPU."""
    fusecli, found = str(Path(sys.executable).parent / "fusecli"), []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            writing = [sys.executable, __file__, "write", name, str(SIZES[size])]
            subprocess.run(writing, check=True)
            torch_alone, _, _ = peak([sys.executable, "-c", "import torch"], folder)
            options = ("--spec", "fuse.yaml", "--allow-code", "lm.py", "--samples", "1")
            command = [fusecli, "fuse", "lm.safetensors", *options]
            most, seconds, said = peak(command, folder)
            assert (folder / "lm.fused.safetensors").exists(), said
            found.append((size, (folder / "lm.safetensors").stat().st_size, most - torch_alone, seconds))
    return found


if __name__ == "__main__":
    write_language_model(Path(sys.argv[2]), int(sys.argv[3]))
