"""Pictures are XML, stay in their frame, and do not grow with what they show."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdserve.core.errors import ConfigError
from pdserve.plot.axis import axis_of, even_axis, tight_axis
from pdserve.plot.cdf import cdfs_svg
from pdserve.plot.chart import Chart
from pdserve.plot.files import write_pictures
from pdserve.plot.gantt import MAX_BARS, gantt_svg

SVG = "{http://www.w3.org/2000/svg}"
finite = st.floats(-1e9, 1e9)


@given(low=finite, span=st.floats(0, 1e9), value=finite)
def test_an_even_axis_encloses_its_values_with_a_few_round_numbers(low, span, value):
    axis = even_axis(low, low + span)
    slack = 1e-9 * max(1.0, abs(low))
    assert axis.low <= low + slack
    assert axis.high >= low + span - slack
    assert 2 <= len(axis.ticks) <= 9
    assert 0 <= axis.share(value) <= 1
    assert axis.share(axis.low) == 0
    assert axis.share(axis.high) == 1


@given(low=st.floats(0, 1e6), span=st.floats(0, 1e6))
def test_a_tight_axis_ends_where_its_values_do(low, span):
    axis = tight_axis(low, low + span)
    assert axis.low == low
    assert axis.share(low) == 0
    assert span < 1 or axis.share(low + span) == 1
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks)


@given(low=st.floats(1e-6, 1e6), factor=st.floats(21, 1e6), bound=st.floats(1e-3, 1e9))
def test_values_of_many_sizes_get_a_logarithmic_axis(low, factor, bound):
    axis = axis_of(low, low * factor, bound)
    assert axis.is_log
    assert axis.low <= min(low, bound) * (1 + 1e-9)
    assert axis.high >= max(low * factor, bound) * (1 - 1e-9)
    assert len(axis.ticks) <= 12
    assert axis.share(0.0) == 0, "what the axis cannot show is put onto its end"


def test_a_chart_names_its_curves_if_there_are_several():
    chart = Chart("a < b", even_axis(0, 10), even_axis(0, 1), x_unit="s", percent=True)
    chart.curve([(0, 0), (10, 1)], "one & only")
    alone = chart.svg()
    assert "one &amp; only" not in alone
    chart.band([0, 10], [0, 0], [0.5, 1], "other")
    chart.mark(5.0)
    tree = ElementTree.fromstring(chart.svg())
    texts = {text.text for text in tree.iter(f"{SVG}text")}
    assert {"a < b", "one & only", "other", "80 %", "s"} <= texts
    [line] = [line for line in tree.iter(f"{SVG}line") if line.attrib["class"] == "s"]
    assert line.attrib["x1"] == "340.0"
    colours = {p.attrib["stroke"] for p in tree.iter(f"{SVG}polyline")}
    colours |= {p.attrib["fill"] for p in tree.iter(f"{SVG}polygon")}
    assert len(colours) == 2


def test_curves_of_several_classes_share_their_axis():
    curves = {"quick": [(1.0, 0.0), (2.0, 1.0)], "slow": [(3.0, 0.0), (9.0, 1.0)]}
    tree = ElementTree.fromstring(cdfs_svg("TTFT", curves, {"quick": 2.5, "slow": 5.0}, "ms"))
    colours = [curve.attrib["stroke"] for curve in tree.iter(f"{SVG}polyline")]
    marks = [line.attrib for line in tree.iter(f"{SVG}line") if line.attrib["class"] == "s"]
    assert len(set(colours)) == 2
    assert [mark["stroke"] for mark in marks] == colours, "each bound has its curve's colour"
    same = cdfs_svg("TTFT", curves, {"quick": 5.0, "slow": 5.0}, "ms")
    assert same.count('class="s"') == 1


BAR = re.compile(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h-([\d.]+)z")


def bars_of(picture: str) -> list[list[tuple[float, ...]]]:
    tree = ElementTree.fromstring(picture)
    paths = [path.attrib["d"] for path in tree.iter(f"{SVG}path")]
    return [[tuple(map(float, bar)) for bar in BAR.findall(path)] for path in paths]


def test_a_gantt_chart_has_a_bar_for_each_stretch_of_work():
    idle = [0.0] * 4
    rows = {
        "prefill-0": [[1.0, 1.0, 0.0, 0.5], idle, idle],
        "decode-0": [idle, [0.0, 0.5, 0.0, 0.0], [1.0, 0.5, 1.0, 0.0]],
    }
    prefill, mixed, decode = bars_of(gantt_svg("work", rows, ("prefill", "mixed", "decode"), 2.5))
    assert len(prefill) == 2, "neighbours of equal height are one bar"
    whole, half = prefill
    assert whole[2] == pytest.approx(2 * half[2], abs=0.2)
    assert (whole[3], half[3]) == (12.0, 6.0)
    assert len(mixed) == 1
    assert [bar[3] for bar in decode] == [12.0, 6.0, 12.0]
    assert decode[1][1] + decode[1][3] == pytest.approx(mixed[0][1]), "one upon the other"


@pytest.mark.parametrize("num_workers", [1, 70, 300])
def test_a_gantt_chart_of_any_cluster_stays_small(num_workers):
    busy = [0.25 + 0.5 * (index % 2) for index in range(512)]
    rows = {f"mixed-{number}": [busy, busy, busy] for number in range(num_workers)}
    picture = gantt_svg("work", rows, ("prefill", "mixed", "decode"), 1.0)
    bars = bars_of(picture)
    assert sum(map(len, bars)) <= MAX_BARS
    assert all(x >= 60 and x + width <= 621 for path in bars for x, _, width, _, _ in path)


def test_a_folder_that_cannot_be_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--plot: cannot write"):
        write_pictures(tmp_path / "file", {"a": "<svg/>"})
    [path] = write_pictures(tmp_path / "new", {"a": "<svg/>"})
    assert path.read_text() == "<svg/>"
