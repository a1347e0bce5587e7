"""One sample through both models in their stored dtype: how far is each from float64?"""

from __future__ import annotations

import math
from typing import Any

from fusecli.equivalence.compare import Incomparable, floating_error
from fusecli.equivalence.findings import Findings
from fusecli.equivalence.groups import observed
from fusecli.equivalence.noise import drifts, noise_of_neighbours
from fusecli.equivalence.run import run
from fusecli.equivalence.subject import Subject
from fusecli.sample import Sample


def measure_drift(subject: Subject, sample: Sample, seed: int, reference: Any, found: Findings) -> None:
    """Runs both models as they are stored; `reference` is what the original answers in float64."""

    def tell(number: int, turn: int, inputs: Any, output: Any) -> None:
        check = found.checks[number]
        if math.isfinite(check.difference.error) and not check.trouble:
            check.stored(turn, inputs, output)

    try:
        with observed(subject.original, subject.groups, subject.passes, tell, subject.shapes):
            original = run(subject.original, sample, seed=seed)
    except Incomparable:
        raise
    except Exception as error:  # e.g. an op that this CPU build has not got in float16
        message = f"not run in the stored dtype, {found.dtype}: {type(error).__name__}: {error}"
        found.unmeasured.append(f"{message}; give the inputs that dtype, if it is theirs")
        return
    try:
        fused = run(subject.fused, sample, seed=seed)
    except Exception as error:
        found.broken.append(f"the fused model raises {type(error).__name__} in the stored dtype: {error}")
        return
    noise, drift = floating_error(reference, original), floating_error(reference, fused)
    if noise is None or drift is None:
        return
    if not math.isfinite(noise):
        found.unmeasured.append("the original itself is not finite in the stored dtype")
        return
    if drifts(drift, noise, found.dtype):
        noise = max(noise, noise_of_neighbours(subject.original, sample, reference, seed))
    found.note_drift(drift, noise, floating_error(reference, original, channels=True) or 0.0)
