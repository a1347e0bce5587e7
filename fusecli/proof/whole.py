"""The whole model, end to end: original and fold on the samples, in float64 and as users run them.

One of the two is in memory at a time. In float64 their parameters are fetched when they are needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fusecli.blame import forward_failed
from fusecli.errors import UsageError
from fusecli.graph.followers import widened
from fusecli.proof.compare import TOLERANCE, Difference, Incomparable, compare, floating_error
from fusecli.proof.findings import Findings
from fusecli.proof.groups import Planned, watching
from fusecli.proof.noise import drifts, narrowest
from fusecli.proof.region import Turn
from fusecli.proof.run import changed_buffers, run
from fusecli.proof.streamed import Fetch, Kept, Weights, give_exact, streamed
from fusecli.proof.trace import End, Trace, followed
from fusecli.sample import Sample, random_state, tensors_in

_OTHER_SEED = 1_000_003
# An error that is no rounding, even if part of a model is computed in bfloat16; and what of it the fold has
# at least where it is rounding all the same.
_NO_ROUNDING = 1e-2
_ALONE = 1e-2
# A model that is further from float64 than this may be on a path that torch takes without modes only.
_SUSPICIOUS = 64
Spans = Sequence[tuple[End, End]]


@dataclass(frozen=True)
class Twin:
    """One of the two models: `build` makes a fresh one in eval mode and its stored dtype.

    exact  float64 values of its parameters by name, where they are other ones than those it holds
    """

    build: Callable[[], nn.Module]
    exact: Mapping[str, Fetch] = field(default_factory=dict)


@dataclass(frozen=True)
class Ran:
    """One run in float64: what it returned and the trace of it; what the members of the groups that were
    asked for were called with; and whether it drew random numbers."""

    output: Any
    trace: Trace
    calls: Sequence[Mapping[Turn, Sample]] = ()
    random: bool = False


@dataclass
class Opened:
    """A twin while it is in memory; `kept` has room for parameters in float64."""

    twin: Twin
    kept: Kept = field(default_factory=Kept)

    @cached_property
    def model(self) -> nn.Module:
        return self.twin.build()

    @cached_property
    def _wide(self) -> tuple[nn.Module, Weights | None]:
        return streamed(self.model, self.twin.exact, kept=self.kept)

    @property
    def wide(self) -> nn.Module:
        return self._wide[0]

    def in_float64(
        self,
        sample: Sample,
        seed: int,
        spans: Spans = (),
        exits: Sequence[End] = (),
        asked: Sequence[Planned] = (),
    ) -> Ran:
        """A run in float64; its trace is that outside of `spans`."""
        try:
            return self._in_float64(sample, seed, spans, exits, asked)
        except Exception:
            if self._wide[1] is None:
                raise
            # Something reads a parameter where no op shows it: it needs them all in their places.
            vars(self)["_wide"] = in_full(self.model, self.twin.exact), None
            return self._in_float64(sample, seed, spans, exits, asked)

    def _in_float64(
        self, sample: Sample, seed: int, spans: Spans, exits: Sequence[End], asked: Sequence[Planned]
    ) -> Ran:
        model, weights = self._wide
        with (
            weights or nullcontext(),
            watching(model, asked) as calls,
            _drawing(model) as drawn,
            followed(model, spans, exits) as trace,
        ):
            output = run(model, sample, seed=seed, dtype=torch.float64)
        if weights is not None and any(tensor.is_meta for tensor in tensors_in(output)):
            raise RuntimeError("a parameter was read where no op shows it")
        return Ran(output, trace, tuple(calls), bool(drawn))

    def as_users(self, sample: Sample, seed: int) -> Any:
        """What it returns in the stored dtype, without modes, hooks of ours or gradients."""
        return run(self.model, sample, seed=seed)

    def watched(self, sample: Sample, seed: int) -> Any:
        """The same under a mode, where torch takes no fast path."""
        with _Watching():
            return run(self.model, sample, seed=seed)


def in_full(model: nn.Module, exact: Mapping[str, Fetch]) -> nn.Module:
    """A float64 copy of `model`, all of its numbers in their places, some of them exact ones."""
    twin = widened(model)
    give_exact(twin.named_parameters(remove_duplicate=False), exact)
    give_exact(twin.named_buffers(remove_duplicate=False), exact)
    return twin


class _Watching(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Seen:
    """One sample through one twin: what it returns in float64 and as users run it, under a mode too where
    that is far from float64; why it does not run so; and the operations of the run under a mode, by name."""

    sample: Sample
    seed: int
    output: Any
    trace: Trace
    stored: Any = None
    watched: Any = None
    failed: Exception | None = None
    unwatched: bool = False
    way: tuple[str, ...] = ()


@dataclass(frozen=True)
class Original:
    """The original on the samples. `doubts` say why it is no function of its input; `calls` what the members
    of the groups that were asked for were called with."""

    seen: Sequence[Seen]
    doubts: tuple[str, ...] = ()
    calls: Sequence[Mapping[Turn, Sample]] = ()


def see_original(
    opened: Opened,
    samples: Sequence[Sample],
    seed: int,
    spans: Spans,
    asked: Sequence[Planned],
    progress: Callable[[str], None],
) -> Original:
    """Raises UsageError where it cannot be run on the samples at all."""
    seen, doubt = list[Seen](), ""
    calls: Sequence[Mapping[Turn, Sample]] = ()
    _ = opened.wide  # what cannot be built or copied is no doubt
    for number, sample in enumerate(samples):
        progress(f"the original, sample {number + 1} of {len(samples)}")
        try:
            ran = opened.in_float64(sample, seed + number, spans, asked=asked if number == 0 else ())
            calls = calls or ran.calls
        except Exception as error:  # whatever somebody's forward may raise
            return Original(seen, (_no_twin(opened, sample, seed + number, error),), calls)
        try:
            one = _stored(opened, Seen(sample, seed + number, ran.output, ran.trace))
        except Incomparable as odd:
            return Original(seen, (str(odd),), calls)
        if number == 0:
            one, doubt = _again(opened, one, spans, random=ran.random)
        seen.append(one)
        if doubt:
            return Original(seen, (doubt,), calls)
    return Original(seen, (), calls)


def _no_twin(opened: Opened, sample: Sample, seed: int, error: Exception) -> str:
    """A model that does not run in its own dtype either got wrong inputs; else it has no float64 twin."""
    try:
        opened.as_users(sample, seed)
    except Exception as plain:
        raise UsageError(forward_failed(plain)) from plain
    return f"the model does not run in float64: {type(error).__name__}: {error}"


def _stored(opened: Opened, seen: Seen) -> Seen:
    """With what it returns in its stored dtype."""
    try:
        stored = opened.as_users(seen.sample, seen.seed)
    except Exception as error:  # e.g. an op that this CPU build has not got in float16
        return replace(seen, failed=error)
    dtype = narrowest(opened.model.parameters())
    noise = floating_error(seen.output, stored)
    if noise is None or not noise > _SUSPICIOUS * torch.finfo(dtype).eps:
        return replace(seen, stored=stored, watched=stored)
    try:
        return replace(seen, stored=stored, watched=opened.watched(seen.sample, seen.seed))
    except Exception:  # half of a fast path may be taken under modes, and not run
        return replace(seen, stored=stored, watched=stored, unwatched=True)


def _again(opened: Opened, seen: Seen, spans: Spans, *, random: bool) -> tuple[Seen, str]:
    """With what a second run shows, with other random numbers and followed; and how the original disagrees
    with itself, "" where it does not. Where it draws random numbers they may be small: float64 shows it."""
    before = {name: buffer.clone() for name, buffer in opened.model.named_buffers()}
    wide = random or seen.failed is not None
    reference = seen.output if wide else seen.stored

    def again(seed: int) -> Any:
        return opened.in_float64(seen.sample, seed).output if wide else opened.as_users(seen.sample, seed)

    try:
        if not wide:
            with suppress(Exception), followed(opened.model, spans) as trace:
                watched = run(opened.model, seen.sample, seed=seen.seed + _OTHER_SEED)
                seen = replace(seen, watched=watched, way=tuple(trace.way))
                if compare(reference, watched).error <= TOLERANCE:
                    return seen, ""
        found = compare(reference, again(seen.seed + _OTHER_SEED))
        if found.error <= TOLERANCE:
            return seen, ""
        if found.undefined:
            return seen, f"the original model returns NaN at {found.where}"
        said = "the original model disagrees with itself on the same input: "
        if compare(reference, again(seen.seed)).error <= TOLERANCE:
            return seen, f"{said}it draws random numbers"
    except Incomparable as odd:
        return seen, str(odd)
    if buffers := changed_buffers(before, opened.wide if wide else opened.model):
        return seen, f"{said}it writes to its buffers {', '.join(buffers[:3])}"
    return seen, f"{said}it keeps a state outside its buffers, or draws random numbers that no seed controls"


@contextmanager
def _drawing(model: nn.Module) -> Iterator[list[None]]:
    """Inside, whether a run has drawn random numbers from a generator that a seed controls: then the list
    has an entry."""
    states: list[Any] = []
    drawn: list[None] = []

    def enter(*_: Any) -> None:
        states.append(random_state())

    def leave(*_: Any) -> None:
        drawn.extend([] if random_state() == states.pop() else [None])

    handles = model.register_forward_pre_hook(enter), model.register_forward_hook(leave)
    try:
        yield drawn
    finally:
        for handle in handles:
            handle.remove()


def hold_against(
    original: Original,
    opened: Opened,
    spans: Spans,
    found: Findings,
    noise: Callable[[Seen], float],
    progress: Callable[[str], None],
) -> None:
    """The fold on the same samples; what is seen goes to `found`. `noise` measures the original's, where one
    run may have been right by luck. Raises Incomparable."""
    _ = opened.wide  # what cannot be built or copied is no finding
    for number, seen in enumerate(original.seen):
        progress(f"the fold, sample {number + 1} of {len(original.seen)}")
        try:
            ran = opened.in_float64(seen.sample, seen.seed, spans)
        except Exception as error:  # whatever somebody's forward may raise
            said = f"the fused model raises {type(error).__name__}: {error}"
            found.end = Difference(math.inf, "output", said)
        else:
            found.inside = found.inside.worse(seen.trace.against(ran.trace))
            found.end = found.end.worse(compare(seen.output, ran.output, channels=True))
        _measure_drift(opened, seen, found, noise)
        found.runs += 1


def _measure_drift(opened: Opened, seen: Seen, found: Findings, more_noise: Callable[[Seen], float]) -> None:
    """How far each is from float64. torch may take a fast path as users run it (nn.TransformerEncoder with a
    padding mask), which is another function than float64 and modes have shown. Then original and fold are
    held against each other, on that path."""
    if seen.failed is not None:
        error = seen.failed
        message = f"not run in the stored dtype, {found.dtype}: {type(error).__name__}: {error}"
        found.unmeasured.append(f"{message}; give the inputs that dtype, if it is theirs")
        return
    try:
        fused = opened.as_users(seen.sample, seen.seed)
    except Exception as error:
        found.broken.append(f"the fused model raises {type(error).__name__} in the stored dtype: {error}")
        return
    reference = seen.output
    noise = floating_error(reference, seen.watched)
    if noise is None:
        return
    if not math.isfinite(noise):
        found.unmeasured.append("the original itself is not finite in the stored dtype")
        return
    gap = noise if seen.unwatched else floating_error(seen.watched, seen.stored)
    if drifts(gap, 0.0 if seen.unwatched else noise, found.dtype):
        # Another function than that of float64: the two are held against each other.
        reference, noise, found.unwatched = seen.stored, 0.0, True
    blind = seen.unwatched and found.unwatched
    channel_noise = 0.0 if blind else floating_error(seen.output, seen.watched, channels=True)
    drift = floating_error(reference, fused)
    if drift is None:
        return
    if noise > _NO_ROUNDING and drift < _ALONE * noise and not seen.unwatched:
        # Only the original is another function than in float64: `if x.dtype == torch.float64` in a norm.
        reference, noise, found.by_dtype = seen.stored, 0.0, True
        drift = floating_error(reference, fused) or 0.0
    if drifts(drift, noise, found.dtype):
        noise = max(noise, more_noise(replace(seen, output=reference)))
    found.note_drift(drift, noise, channel_noise or 0.0)
