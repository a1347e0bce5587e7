"""A Picture as SVG: one file, no scripts, nothing that is loaded from elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape

from rich.cells import cell_len

from fusecli.picture import Fate, Node, Picture, Role
from fusecli.plain import visible
from fusecli.report.figures import counted
from fusecli.report.layers import Layers, layered
from fusecli.report.page import LONGEST, shortened
from fusecli.report.wording import MORE

# Blue and orange, which everybody can tell apart, on a background of our own: a viewer's may be dark.
_STYLE = """
text { font: 12px monospace; fill: #1f2328; text-anchor: middle }
.small, .kind { font-size: 10px; fill: #59636e }
.legend { text-anchor: start }
.head { text-anchor: start; font-weight: bold }
.hidden { text-anchor: start; font-weight: bold }
rect { fill: #f6f8fa; stroke: #818b98 }
.fused { fill: #ddf4ff; stroke: #0969da }
.left { fill: #fff1e5; stroke: #bc4c00; stroke-width: 2.5 }
.move { fill: #ffffff; stroke: #d1d9e0 }
.code { font-size: 11px; font-weight: bold; fill: #953800 }
.rule { font-size: 10px; fill: #0550ae }
path { fill: none; stroke: #818b98 }
.inside { stroke: #0969da; stroke-width: 3 }
.cut { stroke-dasharray: 3 2 }
marker path { fill: #59636e; stroke: none }
"""
_MARKER = (
    '<marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto" '
    'markerUnits="userSpaceOnUse"><path d="M0 0 8 4 0 8z"/></marker>'
)
_LETTER, _BETWEEN, _MARGIN, _PAGE = 7.3, 38.0, 24.0, 1800.0
_LONGEST_LINE = 44


def as_svg(picture: Picture) -> str:
    """The whole picture, from top to bottom; parts that are not connected stand side by side, in rows."""
    legend = list(_legend(picture))
    x, y, row, wide = _MARGIN, 20.0 * len(legend) + 2 * _MARGIN, 0.0, 560.0
    drawn: list[str] = []
    for part in _parts(picture):
        laid, tops = _laid(picture, part)
        if x > _MARGIN and x + laid.width > _PAGE:
            x, y, row = _MARGIN, y + row + 2 * _BETWEEN, 0.0
        drawn += [f'<g transform="translate({x:.0f} {y:.0f})">', *_part(picture, part, laid, tops), "</g>"]
        wide, row = max(wide, x + laid.width + _MARGIN), max(row, tops[-1] - _BETWEEN)
        x += laid.width + 2 * _MARGIN
    size = f'width="{wide:.0f}" height="{y + row + _MARGIN:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"<style>{_STYLE}</style><defs>{_MARKER}</defs>",
            '<rect width="100%" height="100%" style="fill: #ffffff; stroke: none"/>',
            *(
                f'<g transform="translate({_MARGIN:.0f} {20 * at + 16})">{it}</g>'
                for at, it in enumerate(legend)
            ),
            *drawn,
            "</svg>\n",
        ]
    )


def _legend(picture: Picture) -> Iterator[str]:
    yield f'<text class="head" y="12">{_text(picture.title, 68)}</text>'
    groups = {node.group for node in picture.nodes if node.group is not None}
    yield _sample("fused", f"fused: {counted(len(groups), 'group')}")
    modules = {
        (node.note, node.name if node.role is Role.MODULE else at)
        for at, node in enumerate(picture.nodes)
        if node.fate is Fate.LEFT
    }
    codes = Counter(code for code, _ in modules)
    for code, count in sorted(codes.items(), key=lambda found: (-found[1], found[0])):
        yield _sample("left", f"left: {code} × {count}")
    yield (
        f'<text class="legend" x="36" y="12">{_text(MORE)}</text>'
        if codes
        else _sample("left", "left: no norm")
    )
    yield _sample("other", "other modules and ops")
    yield _sample("move", "only moves elements: a view, a transpose")
    yield '<path class="cut" d="M6 8H22"/><text class="legend" x="36" y="12">… goes on, not drawn</text>'


def _sample(style: str, said: str) -> str:
    rect = f'<rect class="{style}" width="28" height="14" rx="3"/>'
    return f'{rect}<text class="legend" x="36" y="12">{_text(said, 68)}</text>'


def _parts(picture: Picture) -> list[list[int]]:
    """The connected parts, each in the order of the run."""
    part = {at: [at] for at in range(len(picture.nodes))}
    for maker, reader in picture.edges:
        small, large = sorted((part[maker], part[reader]), key=len)
        if small is not large:
            large += small
            part |= dict.fromkeys(small, large)
    return sorted({id(found): sorted(found) for found in part.values()}.values())


def _laid(picture: Picture, part: Sequence[int]) -> tuple[Layers, list[float]]:
    """The part's layout, and where each of its layers begins."""
    own = {at: number for number, at in enumerate(part)}
    edges = [(own[maker], own[reader]) for maker, reader in picture.edges if maker in own]
    laid = layered([_width(picture.nodes[at]) for at in part], edges)
    tops = [0.0]
    for layer in laid.layers:
        tallest = max((_height(picture.nodes[part[item]]) for item in layer if item < laid.nodes), default=0)
        tops.append(tops[-1] + tallest + _BETWEEN)
    return laid, tops


def _part(picture: Picture, part: Sequence[int], laid: Layers, tops: Sequence[float]) -> Iterator[str]:
    """Lines first: a line that has to cross a node runs behind it."""
    span: dict[int, tuple[float, float]] = {}
    for top, end, layer in zip(tops, tops[1:], laid.layers, strict=False):
        for item in layer:
            height = end - _BETWEEN - top
            own = _height(picture.nodes[part[item]]) if item < laid.nodes else height
            span[item] = top + (height - own) / 2, top + (height + own) / 2
    for upper, lower, source in laid.links:
        ends = [picture.nodes[part[item]].group for item in (upper, lower) if item < laid.nodes]
        inside = len(ends) == 2 and ends[0] is not None and ends[0] == ends[1]
        begin, stop = (laid.x[upper], span[upper][1]), (laid.x[lower], span[lower][0])
        drop = "" if lower < laid.nodes else f"V{span[lower][1]:.1f}"
        yield _line(begin, stop, drop, inside, picture.nodes[part[source]])
    for item, at in enumerate(part):
        yield from _box(picture.nodes[at], laid.x[item], span[item][0])


def _line(
    begin: tuple[float, float], stop: tuple[float, float], drop: str, inside: bool, source: Node
) -> str:
    (x, y), (to_x, to_y) = begin, stop
    half = (y + to_y) / 2
    curve = f"M{x:.1f} {y:.1f}C{x:.1f} {half:.1f} {to_x:.1f} {half:.1f} {to_x:.1f} {to_y:.1f}{drop}"
    style = ' class="inside"' if inside else ""
    tip = "" if drop else ' marker-end="url(#tip)"'
    shape = f", {_shape(source)}" if source.shape is not None else ""
    return f'<path{style}{tip} d="{curve}"><title>{_text(f"what {source.name} gives{shape}")}</title></path>'


def _box(node: Node, middle: float, top: float) -> Iterator[str]:
    width, height = _width(node), _height(node)
    left, right = middle - width / 2, middle + width / 2
    style = node.fate.value if node.fate is not Fate.OTHER else node.role.value
    round_ = height / 2 if node.role is Role.END else 4
    told = (_called(node), node.kind, _shape(node), f"{node.note}: {node.reason}".strip(": "))
    yield f"<g><title>{'&#10;'.join(map(_text, filter(None, told)))}</title>"
    yield (
        f'<rect class="{style}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.0f}" '
        f'rx="{round_:.0f}"/>'
    )
    for number, (look, line) in enumerate(_lines(node)):
        at = top + 14 + 14 * number
        yield f'<text class="{look}" x="{middle:.1f}" y="{at:.1f}">{escape(line)}</text>'
    yield "</g>"
    if node.above:
        yield _cut(node.above, right - 10, top, top - 14, top - 6)
    if node.below:
        yield _cut(node.below, right - 10, top + height, top + height + 14, top + height + 13)


def _cut(names: Sequence[str], x: float, start: float, end: float, text: float) -> str:
    """An edge that leads out of the picture, with the names of those at its other end."""
    said = f"not drawn: {', '.join(names)}"
    dots = "…" if len(names) == 1 else f"…{len(names)}"
    return (
        f'<g><title>{_text(said)}</title><path class="cut" d="M{x:.1f} {start:.1f}V{end:.1f}"/>'
        f'<text class="hidden" x="{x + 3:.1f}" y="{text:.1f}">{dots}</text></g>'
    )


def _lines(node: Node) -> list[tuple[str, str]]:
    """(style, text) of each line in the box."""
    if node.role is Role.MOVE:
        return [("small", _short(node.name))]
    lines = [("name", _called(node)), ("kind", node.kind)]
    lines.append(("code" if node.fate is Fate.LEFT else "rule", node.note))
    return [(style, _short(line)) for style, line in lines if line]


def _called(node: Node) -> str:
    return f"{node.name} ({node.call})" if node.call else node.name


def _width(node: Node) -> float:
    return max((cell_len(line) for _, line in _lines(node)), default=0) * _LETTER + 20


def _height(node: Node) -> float:
    return 20.0 if node.role is Role.MOVE else 6 + 14.0 * len(_lines(node))


def _shape(node: Node) -> str:
    return "" if node.shape is None else "×".join(map(str, node.shape)) or "a number"


def _short(line: str) -> str:
    return shortened(visible(shortened(line, LONGEST)), _LONGEST_LINE)


def _text(line: str, width: int = LONGEST) -> str:
    return escape(shortened(visible(shortened(line, LONGEST)), width))
