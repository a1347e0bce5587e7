"""One sample through both models in their stored dtype: how far is each from float64?

They are run as a user calls them: no modes, no hooks of ours, no gradients. torch may take a fast path only
there (nn.TransformerEncoder with a padding mask), which is another function than the one that float64 and
hooks have shown. Then original and fold are held against each other, on that path.
"""

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

# An error that is no rounding, even if part of a model is computed in bfloat16; and what of it the fold has
# at least where it is rounding all the same.
_NO_ROUNDING = 1e-2
_ALONE = 1e-2


def measure_drift(subject: Subject, sample: Sample, seed: int, reference: Any, found: Findings) -> None:
    """Runs both models as they are stored; `reference` is what the original answers in float64."""
    watched, trouble = _watched(subject, sample, seed, found)
    proven = reference
    try:
        original = run(subject.original, sample, seed=seed)
    except Exception as error:  # e.g. an op that this CPU build has not got in float16
        message = f"not run in the stored dtype, {found.dtype}: {type(error).__name__}: {trouble or error}"
        found.unmeasured.append(f"{message}; give the inputs that dtype, if it is theirs")
        return
    try:
        fused = run(subject.fused, sample, seed=seed)
    except Exception as error:
        found.broken.append(f"the fused model raises {type(error).__name__} in the stored dtype: {error}")
        return
    noise = floating_error(reference, original if trouble else watched)
    if noise is None:
        return
    if not math.isfinite(noise):
        found.unmeasured.append("the original itself is not finite in the stored dtype")
        return
    gap = noise if trouble else floating_error(watched, original)
    if drifts(gap, 0.0 if trouble else noise, found.dtype):
        # Another function than that of float64: the two are held against each other.
        reference, noise, found.unwatched = original, 0.0, True
    as_proven = original if trouble else watched
    channel_noise = 0.0 if trouble and found.unwatched else floating_error(proven, as_proven, channels=True)
    drift = floating_error(reference, fused)
    if drift is None:
        return
    if noise > _NO_ROUNDING and drift < _ALONE * noise and not trouble:
        # Only the original is another function than in float64: `if x.dtype == torch.float64` in a norm.
        reference, noise, found.by_dtype = original, 0.0, True
        drift = floating_error(reference, fused) or 0.0
    if drifts(drift, noise, found.dtype):
        noise = max(noise, noise_of_neighbours(subject.original, sample, reference, seed))
    found.note_drift(drift, noise, channel_noise or 0.0)


def _watched(subject: Subject, sample: Sample, seed: int, found: Findings) -> tuple[Any, str]:
    """What the original answers while its groups are watched; or why it does not run so."""

    def tell(number: int, turn: int, inputs: Any, output: Any) -> None:
        check = found.checks[number]
        if math.isfinite(check.difference.error) and not check.trouble:
            check.stored(turn, inputs, output)

    try:
        with observed(subject.original, subject.groups, subject.passes, tell, subject.shapes):
            return run(subject.original, sample, seed=seed), ""
    except Incomparable:
        raise
    except Exception as error:  # half of a fast path may be taken under hooks, and not run
        return None, str(error)
