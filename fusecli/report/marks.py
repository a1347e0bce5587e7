"""One sign and one colour per judgement: the sign alone must do, for those who see or print no colour."""

from __future__ import annotations

from fusecli.outcome import Judgement

SIGNS = {Judgement.EQUIVALENT: "✓", Judgement.DIFFERENT: "✗", Judgement.INCONCLUSIVE: "?"}
STYLES = {Judgement.EQUIVALENT: "green", Judgement.DIFFERENT: "red", Judgement.INCONCLUSIVE: "yellow"}
CAUTION = "yellow"


def mark(judgement: Judgement | None) -> tuple[str, str]:
    """(sign, style); a dot where nothing was judged."""
    if judgement is None:
        return "·", "dim"
    return SIGNS[judgement], STYLES[judgement]


def status_mark(status: str) -> tuple[str, str]:
    """The mark of a group: its status is a judgement, or "planned"."""
    judged = status in {judgement.value for judgement in Judgement}
    return mark(Judgement(status) if judged else None)
