"""What the commands that work on a checkpoint have in common: their options are one value, their body is one.

A command is a frozen dataclass whose fields are its parameters, and a function of it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_type_hints

from fusecli.cli import options
from fusecli.cli.reports import Failed, Reports, finish
from fusecli.cli.screen import dialogue
from fusecli.outcome import Outcome

if TYPE_CHECKING:
    from fusecli.consent import Consent
    from fusecli.spec import Spec

_Made = TypeVar("_Made")
_Given = TypeVar("_Given", bound="Given")
Work = Callable[["Spec", "Consent", Callable[[str], None]], Outcome]


@dataclass(frozen=True, kw_only=True)
class Given:
    """The options that all of them have."""

    name: ClassVar[str]

    checkpoint: options.Checkpoint
    spec: options.SpecFile = None
    model: options.Model = None
    inputs: options.Inputs = None
    allow_code: options.AllowCode = None
    allow_pickle: options.AllowPickle = False
    seed: options.Seed = None
    report: options.Report = None
    quiet: options.Quiet = False
    debug: options.Debug = False

    def reports(self, *others: Path | None) -> Reports:
        """Where the reports go; raises UsageError for a file of the command, as `others` are."""
        return Reports.parse(self.report or [], self.quiet, [self.checkpoint, self.spec, *others])

    def read(self) -> Spec:
        """The spec with what was typed; raises UsageError. torch is not imported for that."""
        from fusecli.spec.typed import Typed, spec_from_options

        return spec_from_options(self.spec, self.picked(Typed))

    def picked(self, kind: type[_Made], **others: Any) -> _Made:
        """A value of a dataclass whose fields are named like the options that fill them, or in `others`."""
        named: Sequence[Any] = fields(kind)  # type: ignore[arg-type]  # a dataclass
        found = {each.name: getattr(self, each.name) for each in named if hasattr(self, each.name)}
        return kind(**{**found, **others})

    @property
    def words(self) -> dict[str, tuple[str, ...]]:
        """What a request holds of the words themselves, for the command that comes next."""
        same_path = getattr(self, "assume_same_path", False)
        typed = options.typed_words(self.model, self.inputs, same_path=same_path)
        return {"typed": tuple(typed), "trusted": tuple(options.trusted(None, self.model))}

    def run(self, reports: Reports, work: Work) -> None:
        """Reads the spec, then has `work` do the rest, and exits as its outcome says."""

        def job() -> Outcome:
            spec = self.read()  # before torch is imported: a slip in the spec is told at once
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                from fusecli.commands.fuse import protected

                reports.spare(protected(spec))
                with dialogue(self.quiet) as person:
                    consent = reports.consent(person, self.allow_code, self.model)
                    return work(spec, consent, person.progress)

        finish(Failed(self.name, self.checkpoint, self.spec), reports, job)


@dataclass(frozen=True, kw_only=True)
class Choosing(Given):
    """Those that choose what is fused."""

    target: options.Target = None
    shared: options.Shared = None
    bake: options.Bake = False
    rules: options.Rules = None
    no_rules: options.NoRules = None
    allow_restructure: options.Restructure = False
    remove_idle: options.RemoveIdle = False
    assume_same_path: options.SamePath = False


def command(kind: type[_Given]) -> Callable[[Callable[[_Given], None]], Callable[..., None]]:
    """Makes a function of a `kind` the command whose parameters are the fields of that."""
    hints = get_type_hints(kind, include_extras=True)
    named = fields(kind)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in named
    ]

    def decorate(body: Callable[[_Given], None]) -> Callable[..., None]:
        def called(**values: Any) -> None:
            body(kind(**values))

        called.__name__, called.__doc__ = body.__name__, body.__doc__
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # Typer reads it
        called.__annotations__ = {field.name: hints[field.name] for field in named}
        return called

    return decorate
