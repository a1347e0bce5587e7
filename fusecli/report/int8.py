"""What became int8, and how like the float model it is: the facts for every rendering, and the terminal's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import set_cell_size

from fusecli.outcome import FloatReport, Judgement, Quantization, UnitReport
from fusecli.plain import some
from fusecli.report.facts import INT8_HAZARD
from fusecli.report.figures import ABSENT, counted, size
from fusecli.report.marks import CAUTION, mark
from fusecli.report.page import Page, shortened

# The worst are what somebody looks for; the JSON report has all.
_SHOWN = 12
# Nobody should take the time of the reference for that of int8.
_REFERENCE = (
    "time as torch runs it here: float between quantize and dequantize; integer kernels come with a backend"
)
_WORDS = {"float": "float", "fused": "fused", "int8": "int8"}


def decibels(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f} dB"


def cosine(value: float | None) -> str:
    """Rounded down: 1 is said of nothing that is less."""
    return ABSENT if value is None else f"{int(value * 1e5) / 1e5:.5f}"


def percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f} %"


def hazard(unit: UnitReport) -> str:
    """What the weights' ranges forecast."""
    if unit.weight_range is None or unit.weight_range <= INT8_HAZARD:
        return ""
    return f"weight range {unit.weight_range:.0f}×"


def left_kinds(left: Sequence[FloatReport]) -> dict[tuple[str, str], list[str]]:
    """(op, reason) -> where: what stays float for one reason is said once."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for one in left:
        kinds.setdefault((one.kind, one.reason), []).append(one.name)
    return kinds


def triples(found: Quantization) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of (what, {float, fused, int8}): size, speed, accuracy."""
    if found.bytes:
        yield "size", {name: size(found.bytes.get(name)) for name in _WORDS if name in found.bytes}
    if slowest := found.latency.get("float"):
        yield (
            "time",
            {name: f"{found.latency[name] / slowest:.2f}×" for name in _WORDS if name in found.latency},
        )
    if found.accuracy:
        yield "accuracy", {name: percent(found.accuracy.get(name)) for name in _WORDS}


def whole_model(found: Quantization) -> Iterator[tuple[str, str]]:
    """(what, number) of the model's output, float against int8."""
    by_power, by_angle = found.channel_sqnr, found.channel_cosine
    if found.sqnr is not None:
        channel = f", {by_power.place} {decibels(by_power.value)}" if by_power else ""
        yield "SQNR", decibels(found.sqnr) + channel
    if found.cosine is not None:
        channel = f", {by_angle.place} {cosine(by_angle.value)}" if by_angle else ""
        yield "cosine", f"{cosine(found.cosine)}, the worst sample {cosine(found.worst_cosine)}{channel}"
    if found.constant:
        yield "constant", f"one number in int8, not in float: {some(found.constant)}"
    if found.top1 is not None:
        yield "same top-1", percent(found.top1)


def thresholds(found: Quantization) -> str:
    units = {"sqnr": " dB", "accuracy_drop": " points"}
    words = {"accuracy_drop": "accuracy_drop at most"}
    return ", ".join(
        f"{words.get(n, f'{n} at least')} {v:g}{units.get(n, '')}" for n, v in found.asked.items()
    )


def print_int8(page: Page, found: Quantization) -> None:
    chosen = ", ".join(f"{name} {value}" for name, value in found.options.items())
    page.title("Int8", f"{counted(len(found.units), 'unit')}, {len(found.left)} ops stay float; {chosen}")
    if found.calibration:
        page.hanging("calibrated", f"on {found.calibration}")
    for note in found.notes:
        page.hanging("note", note)
    _equalized(page, found)
    _units(page, found)
    _left(page, found)
    _triples(page, found)
    for what, number in whole_model(found):
        page.hanging(what, number)
    if found.samples:
        page.hanging("on", counted(found.samples, "forward call"))
    if found.asked:
        page.hanging("asked", thresholds(found))


def _units(page: Page, found: Quantization) -> None:
    measured = any(unit.sqnr is not None for unit in found.units)
    page.blank()
    head = f"{'SQNR':>10}{'cosine':>10}" if measured else ""
    page.line(
        (f"  {'worst first' if measured else 'in the order of the run'}", "dim"),
        (head.rjust(page.width - 2 - len("worst first")) if measured else "", "dim"),
    )
    for unit in found.units[:_SHOWN]:
        numbers = f"{decibels(unit.sqnr):>10}{cosine(unit.cosine):>10}" if measured else ""
        remark = hazard(unit)
        room = page.width - 2 - len(numbers) - (len(remark) + 2 if remark else 0)
        names = shortened(page.show(f"{unit.name} ({unit.kind})"), room - 1)
        page.line(
            ("  ", ""),
            (set_cell_size(names, room), ""),
            (f"{remark}  " if remark else "", CAUTION),
            (numbers, ""),
        )
    if len(found.units) > _SHOWN:
        page.hanging(
            "…", f"{len(found.units) - _SHOWN} more; --report json=PATH has all", style="dim", column=4
        )


def _left(page: Page, found: Quantization) -> None:
    if found.left:
        page.title("Float", counted(len(found.left), "op"))
    for (kind, reason), places in left_kinds(found.left).items():
        page.hanging("·", f"{kind}: {some(places)}", column=4)
        page.hanging("", reason, style="dim", column=4)


def _triples(page: Page, found: Quantization) -> None:
    rows = list(triples(found))
    if not rows:
        return
    page.blank()
    page.line((f"  {'':11}" + "".join(f"{name:>12}" for name in _WORDS), "dim"))
    for what, values in rows:
        page.line((f"  {what:11}", "dim"), ("".join(f"{values.get(name, ''):>12}" for name in _WORDS), ""))
    if "int8" in found.latency:
        page.hanging("", _REFERENCE, style="dim")


def _equalized(page: Page, found: Quantization) -> None:
    if found.exact is None:
        return
    sign, style = mark(Judgement.EQUIVALENT)
    moved = f"{counted(len(found.equalized), 'pair')} of layers, float64 error {found.exact:.1e}"
    page.hanging(f"{sign} equalized", moved, label_style=style, column=15)
