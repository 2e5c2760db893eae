"""The page of a plan: each pass where the simulator has it, each part of memory in its measure, nothing loaded."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import pytest

from megatron_r1.memory.parts import MemoryParts
from megatron_r1.plan.pictures.labels import duration_text, ticks
from megatron_r1.plan.pictures.memory_svg import OTHER, largest_parts, memory_svg
from megatron_r1.plan.pictures.page import html_page
from megatron_r1.plan.pictures.pipeline_svg import LEFT, WIDTH, pipeline_svg
from megatron_r1.plan.pipeline.orders import ScheduleShape, build_schedule
from megatron_r1.plan.pipeline.simulate import Durations, Timeline, simulate


def timeline(name: str = "dualpipe", ranks: int = 4, micro_batches: int = 8, chunks: int = 1) -> Timeline:
    schedule = build_schedule(ScheduleShape(name, ranks, micro_batches, chunks))
    return simulate(schedule, Durations.equal(ranks * chunks, 1.0, 1.0, 0.5, p2p=0.1))


MEMORY = [MemoryParts({"weights": 20e9, "activations": (4 - rank) * 10e9}) for rank in range(4)]


def boxes(svg: str) -> list[ET.Element]:
    """Rectangles that say what they are."""
    return [each for each in ET.fromstring(svg).iter("rect") if each.find("title") is not None]


@pytest.mark.parametrize(("name", "chunks"), [("1f1b", 1), ("interleaved", 2), ("zb1p", 1), ("dualpipe", 1)])
def test_each_pass_is_a_box_where_it_was_simulated(name, chunks):
    simulated = timeline(name, chunks=chunks)
    drawn = boxes(pipeline_svg(simulated))
    assert len(drawn) == len(simulated.events)
    for box, event in zip(drawn, simulated.events, strict=True):
        about = box.find("title").text
        assert f"micro-batch {event.micro_batch}, chunk {event.chunk}, rank {event.rank}:" in about
        begin = (float(box.get("x")) - LEFT) / WIDTH * simulated.seconds
        assert begin == pytest.approx(event.start, abs=simulated.seconds / WIDTH)
        width = float(box.get("width")) / WIDTH * simulated.seconds
        assert width == pytest.approx(event.end - event.start, abs=1.5 * simulated.seconds / WIDTH)
    lower = {event.kind for box, event in zip(drawn, simulated.events, strict=True) if box.get("height") == "11"}
    assert lower == ({"forward", "backward"} if name == "dualpipe" else set())


def test_a_long_step_shows_its_beginning_and_its_end():
    simulated = timeline("1f1b", 2, 500)
    titles = [box.find("title").text for box in boxes(pipeline_svg(simulated))]
    assert 380 < len(titles) < 420
    numbers = {int(re.search(r"micro-batch (\d+)", title)[1]) for title in titles}
    assert {0, 499} <= numbers and not numbers & set(range(60, 440))


def test_bars_are_as_long_as_what_they_measure():
    svg = memory_svg(MEMORY, 80e9)
    parts = boxes(svg)
    lengths = [float(part.get("width")) for part in parts]
    assert [round(length / lengths[0], 3) for length in lengths] == [1, 0.5, 0.75, 0.5, 0.5, 0.5, 0.25, 0.5]
    assert parts[1].find("title").text == "rank 0, weights: 20.0 GB"
    [limit] = [each for each in ET.fromstring(svg).iter("path") if each.get("class") == "limit"]
    at = float(re.match(r"M([\d.]+)", limit.get("d"))[1]) - LEFT
    assert at / lengths[0] == pytest.approx(2, rel=0.01)


def test_parts_without_a_colour_are_one():
    many = MemoryParts({f"part {number}": (number + 1) * 1e9 for number in range(12)})
    assert [*largest_parts([many])] == [*(f"part {number}" for number in range(11, 4, -1)), OTHER]
    assert "rank 0, other: 15.0 GB" in memory_svg([many], 0)
    assert memory_svg([], 80e9) == ""


def test_the_page_loads_nothing_and_escapes_what_it_is_given():
    page = html_page("a <plan>", timeline(), MEMORY, 80e9, [("layout", "<TP2>")])
    assert "a &lt;plan&gt;" in page and "&lt;TP2&gt;" in page and "<TP2>" not in page
    assert not re.search(r"<script|https?://|src=|@import|url\(", page)
    assert "default-src &#39;none&#39;" in page
    for text in ("forward", "backward: gradients of weights", "activations", "a GPU has 80 GB", "idle for"):
        assert text in page
    assert "Memory of each" not in html_page("plan", timeline(), [], 0)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_renders_in_a_browser(tmp_path):
    (tmp_path / "plan.html").write_text(html_page("plan", timeline(), MEMORY, 80e9))
    picture = tmp_path / "plan.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--window-size=1500,1000", f"--screenshot={picture}", (tmp_path / "plan.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert picture.stat().st_size > 30_000


def test_axes_have_round_numbers():
    assert list(ticks(0.0, 10.0, about=5)) == pytest.approx([0, 2, 4, 6, 8, 10])
    assert list(ticks(0.34, 0.71, about=4)) == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert [duration_text(seconds) for seconds in (0.0, 2e-6, 0.0123, 61.76)] == ["0", "2 µs", "12.3 ms", "61.8 s"]
