"""torchao, brought lazily and quietly: the one file that imports it.

torchao is optional, its import warns about extensions it cannot load, and its pt2e flow prints while it
works: none of that is the user's business, so all of it runs inside `quiet`.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from fusecli.errors import Problem, UsageError

# torch's own compiler registers the ops of a converted graph when it is imported, so that a saved model runs
# where torchao is not installed. It is an internal module; torchao registers them too, and is the second try.
REGISTERING = ("torch._inductor.decomposition", "torchao.quantization.pt2e.quantize_pt2e")


@dataclass(frozen=True)
class Flow:
    """The names of torchao that are used here: the two steps of its flow, its observers, its annotations."""

    prepare: Any
    convert: Any
    Quantizer: Any
    Annotation: Any
    Spec: Any
    SharedSpec: Any
    MinMax: Any
    PerChannelMinMax: Any
    Histogram: Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, no warning, no log record and no print reaches the terminal; errors do."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@cache
def flow() -> Flow:
    """The parts of torchao; UsageError where it is not installed, or too old to have them."""
    try:
        with quiet():
            steps = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
            quantizer = importlib.import_module("torchao.quantization.pt2e.quantizer")
            observer = importlib.import_module("torchao.quantization.pt2e.observer")
    except ImportError as error:
        fix = "install the extra that brings it: pip install 'fusecli[quantize]'"
        raise UsageError(Problem(f"quantizing needs torchao: {error}", "", fix)) from None
    return Flow(
        steps.prepare_pt2e,
        steps.convert_pt2e,
        quantizer.Quantizer,
        quantizer.QuantizationAnnotation,
        quantizer.QuantizationSpec,
        quantizer.SharedQuantizationSpec,
        observer.MinMaxObserver,
        observer.PerChannelMinMaxObserver,
        observer.HistogramObserver,
    )


def register_ops() -> None:
    """Makes torch know the quantize and dequantize ops that a converted graph calls."""
    for name in REGISTERING:
        if hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
            return
        with quiet(), contextlib.suppress(ImportError):
            importlib.import_module(name)
    if not hasattr(torch.ops.quantized_decomposed, "quantize_per_tensor"):
        flow()  # says what to install
