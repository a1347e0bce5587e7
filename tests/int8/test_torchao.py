"""torchao is optional, imported by one file, and never heard."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from fusecli.errors import UsageError
from fusecli.int8 import torchao
from fusecli.int8.quantize import plan, quantize
from fusecli.int8.saved import save
from fusecli.sample import Sample
from tests.int8.nets import Conv, ConvReLU


def ran(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *options, "-c", textwrap.dedent(code)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_the_whole_flow_prints_nothing(tmp_path):
    ended = ran(
        f"""
        import warnings
        import torch
        from pathlib import Path
        from fusecli.int8.quantize import plan, quantize
        from fusecli.int8.packed import packed, unpacked
        from fusecli.int8.saved import load, save
        from fusecli.sample import Sample
        import sys
        layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten()
        model = torch.nn.Sequential(*layers).eval()
        sample = Sample((torch.randn(2, 3, 5, 5),))
        plan(model, sample)
        assert "torchao" not in sys.modules
        done = quantize(model, [sample])
        assert "torchao" in sys.modules
        save(done, Path({str(tmp_path / "x.pt2")!r}))
        load(Path({str(tmp_path / "x.pt2")!r}))(*sample.args)
        unpacked(model, sample, *packed(done))
        """,
        "-W",
        "always",
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_what_comes_after_is_heard(capfd, caplog, recwarn):
    torchao.flow.cache_clear()
    torchao.flow()
    print("printed")
    logging.getLogger("x").warning("logged")
    warnings.warn("warned", UserWarning, stacklevel=1)
    assert (capfd.readouterr().out, caplog.messages[-1], len(recwarn)) == ("printed\n", "logged", 1)


def test_without_torchao(monkeypatch):
    torchao.flow.cache_clear()
    for name in ("torchao.quantization.pt2e.quantize_pt2e", "torchao.quantization", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)
    sample = Sample((torch.randn(2, 3, 5, 5),))
    assert plan(Conv().eval(), sample).units
    with pytest.raises(UsageError, match=r"quantizing needs torchao: .*pip install 'fusecli\[quantize\]'"):
        quantize(Conv().eval(), [sample])


def test_a_saved_model_runs_without_torchao(tmp_path):
    done = quantize(ConvReLU().eval(), [Sample((torch.randn(2, 3, 5, 5),))])
    x = torch.randn(3, 3, 5, 5)
    save(done, tmp_path / "x.pt2")
    torch.save((x, done.model(x)), tmp_path / "io.pt")
    ended = ran(
        f"""
        import sys
        sys.modules["torchao"] = None
        import torch
        from pathlib import Path
        from fusecli.int8.saved import load
        x, y = torch.load({str(tmp_path / "io.pt")!r})
        assert torch.equal(load(Path({str(tmp_path / "x.pt2")!r}))(x), y)
        """
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
