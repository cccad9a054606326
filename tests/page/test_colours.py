"""A page and a picture have one key; on a page all text can be read, and no accent looks like a kind."""

import re
from collections import defaultdict
from importlib.resources import files

import pytest
from matplotlib.colors import to_hex

from dualpipe.page import Comparison, Page, colours, render
from dualpipe.page.drawing import drawing, run
from dualpipe.schedule import COMPUTE
from dualpipe.timeline.picture import draw
from tests.pictures.cases import TIMELINES
from tests.pictures.seeing import VISIONS, contrast, nearest

TONES = range(1, 7)
SCHEMES = pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])


def properties(css):
    """The custom properties of the light scheme, which paper has too, and those of a dark screen."""
    blocks = re.findall(r"(@media screen and \(prefers-color-scheme: dark\) \{\s*)?:root\S* \{(.*?)\}", css, re.DOTALL)
    light, dark = {}, {}
    for media, block in blocks:
        (dark if media else light).update(re.findall(r"--([\w-]+): ([^;]*);", block))
    return light, dark


CSS = colours.style(TONES) + (files("dualpipe.page") / "page.css").read_text(encoding="utf-8")
PALETTES = properties(CSS)
CELLS = [f"{kind}-{tone}-of-{tones}" for tones in TONES for tone in range(1, tones + 1) for kind in "fbw"]
LINES = ["f-line", "b-line", "w-line"]


def test_every_colour_is_there_for_light_and_dark():
    light, dark = PALETTES
    assert light.keys() - dark.keys() == {"sans", "mono"}
    assert {*CELLS, *LINES, "bubble", "hatch"} <= dark.keys() <= light.keys()
    used = set(re.findall(r"var\(--([\w-]+)\)", CSS))
    assert used <= light.keys()


@pytest.mark.parametrize("name", TIMELINES)
def test_a_cell_has_the_colour_that_it_has_in_the_picture(name):
    timeline = TIMELINES[name]
    schedule = timeline.schedule
    shown = drawing(run(schedule, timeline.costs, blocking=False))
    light, _ = properties(render(Page("a page", "", (Comparison(name, after=schedule),))))
    pictures = {
        collection.get_gid(): to_hex(collection.get_facecolor()[0])
        for collection in draw(timeline).axes[0].collections
        if collection.get_gid() not in ("bubble", "overlap")
    }
    pages = defaultdict(set)
    for op in (at.op for at in schedule if at.op.kind in COMPUTE):
        tone, chunk = shown["tones"][op.lane][op.stage], schedule.routes[op.lane][: op.stage].count
        gid = f"{op.kind}{op.lane}{chunk(schedule.routes[op.lane][op.stage])}"
        pages[gid].add(light[f"{op.kind.lower()}-{tone + 1}-of-{len(shown['names'])}"])
    assert {gid: {pictures[gid]} for gid in pages} == pages
    assert len({frozenset(seen) for seen in pages.values()}) == len(pages), "no two look alike"


@pytest.mark.parametrize("name", TIMELINES)
def test_the_key_names_the_tones_as_the_picture_does(name):
    timeline = TIMELINES[name]
    shown = drawing(run(timeline.schedule, timeline.costs, blocking=False))
    (legend,) = draw(timeline).legends
    words = [text.get_text().partition("forward") for text in legend.get_texts()]
    assert [after.removeprefix(", ") for _, kind, after in words if kind] == list(shown["names"])


def test_a_page_has_the_colours_of_its_own_schedules_and_no_others():
    css = colours.style(len(names) for names in (["lane >", "lane <"], [""], [""]))
    assert set(re.findall(r"-of-(\d)", css)) == {"1", "2"}
    light, dark = properties(css)
    assert light.keys() == dark.keys()


PAIRS = [(f"{name}-ink", name) for name in CELLS + LINES]
PAIRS += [("text", "ground"), ("muted", "ground"), ("muted", "raised"), ("accent", "ground"), ("changed", "ground")]
PAIRS += [("fault", "ground"), ("ground", "fault"), ("fault", "fault-ground"), ("good", "good-ground")]
PAIRS += [("warn", "warn-ground"), ("text", "added-ground"), ("text", "removed-ground"), ("text", "hover")]


@SCHEMES
@pytest.mark.parametrize(("text", "ground"), PAIRS)
def test_text_has_enough_contrast(text, ground, scheme):
    palette = PALETTES[scheme]
    assert contrast(palette[text], palette[ground]) >= 4.5


@SCHEMES
def test_names_of_cells_that_fade_behind_a_counterexample_can_be_read(scheme):
    palette = PALETTES[scheme]
    for name in CELLS:
        assert contrast(palette["text"], over(palette[name], palette["ground"], float(palette["faded"]))) >= 4.5, name


@SCHEMES
def test_what_is_thin_stands_out_from_the_ground(scheme):
    """3 to 1 (WCAG 2.2, 1.4.11), but for weights, which no message feeds and whose frame is not all that tells them."""
    palette = PALETTES[scheme]
    for name in ("f-line", "b-line", "fault", "changed", "need"):
        assert contrast(palette[name], palette["ground"]) >= 3, name


@SCHEMES
def test_no_accent_looks_like_a_kind_or_like_another(scheme):
    palette = PALETTES[scheme]
    accents = [palette[name] for name in ("fault", "changed", "need")]
    assert nearest([*accents, *(palette[name] for name in LINES)], "common") > 30
    for vision in VISIONS:
        for other in ("f-line", "b-line", "w-line", "changed", "need"):
            assert nearest([palette["fault"], palette[other]], vision) > 15, (vision, other)


def over(colour, ground, opacity):
    mixed = (
        round(opacity * int(colour[at : at + 2], 16) + (1 - opacity) * int(ground[at : at + 2], 16)) for at in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02x}" for channel in mixed)
