"""A picture as SVG: what is drawn can be read, nothing runs, nothing lies on top of something else."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest

from fusecli.picture import Fate, Node, Picture, Role
from fusecli.plain import visible
from fusecli.report import as_svg
from fusecli.report.layers import layered
from tests.report.outcomes import HOSTILE_NAMES

SVG = "{http://www.w3.org/2000/svg}"
CONV = Node("conv", "Conv2d", Role.MODULE, fate=Fate.FUSED, note="conv_bn", group=0, shape=(2, 6, 8, 8))
BN = Node("bn", "BatchNorm2d", Role.MODULE, fate=Fate.FUSED, note="conv_bn", group=0)
LEFT = Node(
    "norm", "BatchNorm2d", Role.MODULE, fate=Fate.LEFT, note="no-linear-producer", reason="relu feeds it"
)
PLAIN = Node("relu", "in block", Role.OP)
SMALL = Picture("model.pt", (CONV, BN, PLAIN, LEFT), ((0, 1), (1, 2), (2, 3), (0, 3)))


def parsed(picture: Picture) -> ElementTree.Element:
    return ElementTree.fromstring(as_svg(picture))


def boxes(picture: Picture) -> dict[str, tuple[str, list[str], str]]:
    """(colour class, lines, tooltip) of each box by its first line."""
    found = {}
    for box in parsed(picture).iter(f"{SVG}g"):
        rect, title = box.find(f"{SVG}rect"), box.find(f"{SVG}title")
        if rect is not None and title is not None:
            lines = [text.text or "" for text in box.findall(f"{SVG}text")]
            found[lines[0]] = (rect.get("class", ""), lines[1:], title.text or "")
    return found


def legend(picture: Picture) -> list[str]:
    return [text.text or "" for text in parsed(picture).iter(f"{SVG}text") if text.get("class") == "legend"]


def test_colours_codes_and_reasons() -> None:
    found = boxes(SMALL)
    assert list(found) == ["conv", "bn", "relu", "norm"]
    assert found["conv"] == ("fused", ["Conv2d", "conv_bn"], "conv\nConv2d\n2×6×8×8\nconv_bn")
    assert found["relu"][:2] == ("op", ["in block"])
    assert found["norm"][:2] == ("left", ["BatchNorm2d", "no-linear-producer"])
    assert found["norm"][2].endswith("no-linear-producer: relu feeds it")


def test_the_edge_inside_a_group_stands_out() -> None:
    inside = [path for path in parsed(SMALL).iter(f"{SVG}path") if path.get("class") == "inside"]
    assert len(inside) == 1
    other = replace(SMALL, nodes=(CONV, replace(BN, group=1), PLAIN, LEFT))
    assert "inside" not in {path.get("class") for path in parsed(other).iter(f"{SVG}path")}


def test_the_legend_counts_modules_and_not_their_calls() -> None:
    twice = replace(
        SMALL, nodes=(*SMALL.nodes, replace(LEFT, call="call 2 of 2"), replace(LEFT, name="other"))
    )
    assert legend(SMALL)[:2] == ["fused: 1 group", "left: no-linear-producer × 1"]
    assert legend(twice)[:2] == ["fused: 1 group", "left: no-linear-producer × 2"]
    assert legend(Picture("nothing"))[:2] == ["fused: 0 groups", "left: no norm"]


def test_what_is_not_drawn_is_said() -> None:
    cut = Picture("model.pt", (replace(PLAIN, above=("input 0",), below=("a", "b")),))
    texts = [text.text for text in parsed(cut).iter(f"{SVG}text") if text.get("class") == "hidden"]
    assert texts == ["…", "…2"]
    assert {"not drawn: input 0", "not drawn: a, b"} <= {
        title.text for title in parsed(cut).iter(f"{SVG}title")
    }


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_stay_text(name: str) -> None:
    node = Node(name, name, Role.OP, name, Fate.LEFT, name, name, above=(name,), below=(name,))
    text = as_svg(Picture(name, (node, node), ((0, 1),)))
    text.encode("utf-8")
    root = ElementTree.fromstring(text)
    ours = {"svg", "style", "defs", "marker", "path", "rect", "text", "title", "g"}
    assert {element.tag for element in root.iter()} == {SVG + tag for tag in ours}
    # Nothing that runs or is loaded: every attribute is one of ours, and every address is in the file itself.
    attributes = {attribute for element in root.iter() for attribute in element.attrib}
    assert not [attribute for attribute in attributes if "href" in attribute or attribute.startswith("on")]
    marked = {value for e in root.iter() for value in e.attrib.values() if "url" in value}
    assert marked <= {"url(#tip)"}
    assert all(char.isprintable() or char == "\n" for char in "".join(root.itertext()))
    if 0 < len(name) < 100:
        assert f"not drawn: {visible(name)}" in {title.text for title in root.iter(f"{SVG}title")}


def test_the_same_each_time_and_a_background_of_its_own() -> None:
    assert as_svg(SMALL) == as_svg(SMALL)
    first = next(parsed(SMALL).iter(f"{SVG}rect"))
    assert (first.get("width"), first.get("height")) == ("100%", "100%")
    assert "fill: #ffffff" in first.get("style", "")


# Every node of a layer is read by each of the next two: as tangled as networks get.
TANGLED = [(a, b) for a, b in combinations(range(24), 2) if b // 4 - a // 4 in (1, 2)]
LINE = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4)]


@pytest.mark.parametrize("edges", [LINE, TANGLED], ids=["shortcut", "tangled"])
def test_nothing_overlaps_and_every_edge_leads_down_one_layer(edges: list[tuple[int, int]]) -> None:
    laid = layered([80.0] * (max(map(max, edges)) + 1), edges)
    level = {item: number for number, layer in enumerate(laid.layers) for item in layer}
    assert sorted(level) == list(range(len(laid.widths)))
    assert all(level[lower] == level[upper] + 1 for upper, lower, _ in laid.links)
    for layer in laid.layers:
        for a, b in combinations(layer, 2):
            assert abs(laid.x[a] - laid.x[b]) >= (laid.widths[a] + laid.widths[b]) / 2
    assert min(x - width / 2 for x, width in zip(laid.x, laid.widths, strict=True)) == pytest.approx(0)
    # The edges are those that were given: a long one goes through places of its own.
    ends = {(source, lower) for _, lower, source in laid.links if lower < laid.nodes}
    assert ends == set(edges)


def test_a_long_edge_runs_beside_the_nodes() -> None:
    laid = layered([80.0] * 5, LINE)
    passing = [item for item in range(len(laid.widths)) if item >= laid.nodes]
    assert len(passing) == 3
    assert all(abs(laid.x[item] - laid.x[node]) >= 40 for item in passing for node in (1, 2, 3))


def test_what_reads_nothing_stands_just_above_its_reader() -> None:
    laid = layered([10.0] * 5, [(0, 2), (2, 3), (3, 4), (1, 4)])
    assert [sorted(layer) for layer in laid.layers] == [[0], [2], [1, 3], [4]]


def test_parts_that_are_not_connected_are_side_by_side_in_rows() -> None:
    many = Picture("model.pt", tuple(replace(PLAIN, name=f"op {n}") for n in range(60)))
    places = re.findall(
        r'<g transform="translate\((\d+) (\d+)\)"><|<g transform="translate\((\d+) (\d+)\)">\n', as_svg(many)
    )
    parts = [(int(x), int(y)) for _, _, x, y in places if x]
    assert len(set(parts)) == 60
    assert len({y for _, y in parts}) > 1
    assert max(x for x, _ in parts) < 1800
