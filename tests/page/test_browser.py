"""The page in a real browser: drawn without errors, explained under the pointer, moved by hand and by keys."""

import pytest

from dualpipe.cli.page import comparison
from dualpipe.page import Comparison, Counterexample, Drawn, Gallery, Mark, Page, Steps, render
from dualpipe.schedule import B, F, Kind, Schedule, W
from dualpipe.schedule.generate import dualpipe, dualpipev, one_f_one_b
from dualpipe.schedule.text import loads
from dualpipe.timeline.palette import DARK, LIGHT, NAMES, colour
from dualpipe.timeline.simulate import simulate
from proofs.prove import prove
from tests.page.browser import Shown, chromium, missing
from tests.pictures.cases import INTERLEAVED
from tests.proofs.faults import (
    a_ring_sends_before_it_receives,
    receives_and_sends_not_coalesced,
    two_sends_of_a_batch_swapped,
)

pytestmark = pytest.mark.skipif(
    bool(missing()),
    reason=f"{missing()}: would have shown that a browser draws every op of a page without an error, says what an op "
    "needs under the pointer and on keys, zooms, draws the counterexample's arrows, and follows the dark scheme",
)

LEFT, RIGHT, DOWN, ESCAPE = "\ue012", "\ue014", "\ue015", "\ue00c"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def show(driver, tmp_path):
    """Open a page of these sections in these media; afterwards the console must be empty and the media as they were."""
    opened = []

    def call(*sections, **media):
        opened.append(Shown(driver, render(Page("a page", "proved", sections)), tmp_path / "page.html", **media))
        return opened[-1]

    yield call
    for page in opened:
        assert page.problems() == []
        page.media()


def refuted(schedule, before=None):
    return comparison(prove(schedule, smt=False), schedule, before)


COLLECTIVES = """\
lane > 0 1
group 0: 0 1
rank 0: 0US> 0F0> 0AA0> 0SF0> 0RB0> 0B0>+0W0> 0RG>+0AR>@0 0RS>
rank 1: 1US> 1RF0> 1F0> 1AA0> 1B0>+1W0> 1SB0> 1RG>+1AR>@0 1RS>
"""
HIT = """
  s.view.fit();
  const zoom = args[0], ops = t.scene.schedule.ops;
  let [missed, seen] = [[], 0];
  for (const one of ops) {
    s.view.show(one.x0 - zoom, one.x1 + zoom);
    t.repaint();
    const box = t.boxOf(one);
    if (box.left < 0 || box.right > t.scene.width) missed.push(`${one.text} is out of view`);
    const found = t.opAt(box.middle, box.centre);
    if (found !== one) missed.push(`${one.text}: ${found?.text}`);
    seen += 1;
  }
  return [seen, missed];
"""


@pytest.mark.parametrize(
    "schedule",
    [dualpipe(4, 8), a_ring_sends_before_it_receives(), loads(COLLECTIVES)],
    ids=["dualpipe", "a ring that is stuck", "collectives"],
)
def test_every_op_of_the_schedule_is_found_where_it_is_drawn(show, schedule):
    page = show(Comparison("x", after=schedule, blocking=True))
    seen, missed = page.run(HIT, 4)
    assert (seen, missed) == (sum(1 for _ in schedule), [])


def test_cells_have_the_colour_of_their_kind_and_lane_and_messages_the_hue_of_what_they_feed(show):
    page = show(Comparison("x", after=dualpipe(4, 8)))
    for op, kind, tone in (("0F0>", F, 0), ("3F0<", F, 1), ("3B0<", B, 1), ("0W3>", W, 0)):
        assert page.pixel(op) == page.colour(f"{kind.value.lower()}-{tone + 1}-of-2"), op
        assert page.pixel(op) == channels(colour(kind, tone, 2)), "as in a picture"
    for op, name in (("0SF0>", "f-line"), ("3SB0<", "b-line")):
        assert page.pixel(op) == page.colour(name), op


def test_schedules_of_a_gallery_share_the_stretch_of_time_also_with_their_memory(show):
    memory = [Steps((0, 1, 5), (1, 2, 0)), Steps((0, 2, 6), (0, 4, 0))]
    drawn = [Drawn(name, name, simulate(one_f_one_b(2, 4)), memory) for name in ("one", "other")]
    page = show(Gallery("x", drawn, "live"))
    widths = """
      s.view.show(...args);
      const boxes = [...document.querySelectorAll(".memory svg")].map((svg) => svg.viewBox.baseVal);
      return [s.timelines.length, boxes.map((box) => [box.x, box.width]), s.view.from, s.view.to - s.view.from];
    """
    for stretch in ((0, 8), (2, 5)):
        count, boxes, start, width = page.run(widths, *stretch)
        assert count == 2
        assert boxes == [pytest.approx([start, width])] * 2
    labels = page.run(
        'return [...document.querySelectorAll(".memory svg")].map((svg) => svg.getAttribute("aria-label"));'
    )
    assert labels == ["Memory, live: rank 0 up to 2, rank 1 up to 4"] * 2


@pytest.mark.parametrize(
    ("schedule", "ops"),
    [(dualpipev(4, 8), ["0F0>", "4F0>"]), (loads(INTERLEAVED), ["0B0>", "2B0>", "4B0>"])],
    ids=["a V", "three chunks per rank"],
)
@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_stages_of_one_lane_on_one_rank_differ_in_shade(show, schedule, ops, scheme):
    page = show(Comparison("x", after=schedule), prefers_color_scheme="light" if scheme is LIGHT else "dark")
    for tone, op in enumerate(ops):
        assert page.pixel(op) == channels(colour(Kind(op[1]), tone, len(ops), scheme)), op


def channels(text):
    return [int(text[at : at + 2], 16) for at in (1, 3, 5)]


KEY = """
  const ground = (swatch) => getComputedStyle(swatch).backgroundColor.match(/\\d+/g).map(Number);
  return [...document.querySelectorAll('.legend li')].map((entry) => [
    entry.innerText.trim(),
    [...entry.querySelectorAll('.swatch')].map(ground),
  ]);
"""


def test_the_key_has_the_words_and_the_shades_of_pictures(show):
    page = show(Comparison("x", one_f_one_b(4, 8), dualpipe(4, 8)))
    told = page.run(KEY)
    which = "lane >, lane <"
    for tones, entries in ((1, told[:3]), (2, told[3:6])):
        for kind, (word, swatches) in zip((F, B, W), entries, strict=True):
            assert word == NAMES[kind] + (f": {which}" if (kind, tones) == (F, 2) else "")
            assert swatches == [channels(colour(kind, tone, tones)) for tone in range(tones)]
    assert [word for word, _ in told[6:]] == ["bubble", "send", "receive", "changed"]


def test_only_where_a_rank_waits_is_the_row_hatched(show):
    page = show(Comparison("x", after=dualpipe(4, 8)))
    seen = page.run(
        "const bottom = t.boxOf(op('1F0>')).bottom, at = (time) => t.scene.x(time);"
        "const steps = (from, to) => [...Array(Math.floor(to - from) - 4).keys()].map((step) => from + 2 + step);"
        "const seen = (from, to) => [...new Set(steps(at(from), at(to)).map((x) => pixel(x, bottom - 3).join()))];"
        "return [seen(0, 1), seen(1, 2)];"
    )
    waits, computes = ([[int(part) for part in text.split(",")] for text in row] for row in seen)
    assert page.colour("bubble") in waits
    assert min(map(sum, waits)) < sum(page.colour("bubble")) - 60, "the hatching is darker"
    assert computes == [page.colour("f-1-of-2")]


def test_pointing_at_an_op_tells_its_needs_and_outlines_them(show):
    page = show(Comparison("x", after=dualpipe(4, 8)))
    edge = "const box = t.boxOf(op('1F1>')); return pixel(box.left + 1, box.centre);"
    page.run("s.view.fit()")
    assert page.run(edge) != page.colour("need")
    assert page.tooltip() == ""
    page.point_at("1B1>")
    assert page.run(edge) == page.colour("need")
    told = page.tooltip()
    assert told.startswith("1B1>")
    assert "backward for the input, microbatch 1 at stage 1" in told
    assert "rank 1, slot 16" in told
    assert "1F1>: rank 1, slot 5" in told
    assert "1RB1>: rank 1, slot 15" in told
    assert page.run("return t.scene.hovered.text") == "1B1>"
    page.run("t.canvas.dispatchEvent(new PointerEvent('pointerleave'))")
    assert page.tooltip() == ""


def test_a_line_to_what_is_needed_in_the_same_row_leaves_the_names_between_alone(show):
    page = show(Comparison("x", after=loads(INTERLEAVED)))
    between = "const box = t.boxOf(op('4F0>')); return pixel(box.left + 4, box.centre);"
    page.point_at("2B0>")
    assert page.run("return t.scene.hovered.text") == "2B0>"
    assert page.run(between) == page.colour("f-3-of-3")


def test_a_message_that_meets_another_says_so(show):
    page = show(refuted(two_sends_of_a_batch_swapped()))
    page.point_at("1RF3>")
    assert "matched with 3SB1< of rank 0, slot 13, which is not its partner" in page.tooltip()
    page.point_at("1RF2>")
    assert "not its partner" not in page.tooltip()


def test_keys_walk_the_ops_and_follow_needs_and_messages(show):
    page = show(Comparison("x", after=dualpipe(4, 8)))
    page.run("t.canvas.focus(); s.view.fit();")
    selected = "return t.scene.selected?.text ?? null"
    walk = [
        (RIGHT, "0F0>"),
        (RIGHT, "0SF0>"),
        ("m", "1RF0>"),
        ("n", "0SF0>"),
        ("n", "0F0>"),
        (DOWN, "1F0>"),
        (LEFT, "1RF0>"),
    ]
    for key, op in walk:
        page.press(key)
        assert page.run(selected) == op
    announced = page.run("return document.getElementById('announcer').textContent")
    assert announced.startswith("1RF0>: receives the activation of microbatch 0 for stage 1 from rank 0")
    assert "Needs 0SF0>: rank 0, slot 1." in announced
    assert page.tooltip().startswith("1RF0>")
    page.press(ESCAPE)
    assert page.run(selected) is None


RANGE = "return [s.view.from, s.view.to]"


def test_buttons_keys_wheel_and_drag_move_the_view(show, driver):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    page = show(Comparison("x", dualpipe(4, 8), dualpipe(4, 8)))
    whole = page.run(RANGE)

    def width():
        start, end = page.run(RANGE)
        return end - start

    def click(label):
        driver.find_element(By.CSS_SELECTOR, f"button[aria-label='{label}']").click()

    click("Zoom in")
    assert width() == pytest.approx((whole[1] - whole[0]) / 1.5)
    start = page.run(RANGE)[0]
    click("Later")
    assert page.run(RANGE)[0] > start
    click("Show everything")
    assert page.run(RANGE) == pytest.approx(whole)
    page.run("t.canvas.focus()")
    page.press("+", "+")
    assert width() < (whole[1] - whole[0]) / 1.8
    page.press("0")
    assert page.run(RANGE) == pytest.approx(whole)
    held = page.run(
        "const x = 700, time = t.time(x), clientX = t.canvas.getBoundingClientRect().left + x;"
        "const turn = { deltaY: -100, clientX, ctrlKey: true, cancelable: true };"
        "t.canvas.dispatchEvent(new WheelEvent('wheel', turn));"
        "return [time, t.time(x)]"
    )
    assert held[0] == pytest.approx(held[1]), "the time under the pointer stays there"
    assert width() < whole[1] - whole[0]
    before = page.run(RANGE)
    page.run("t.canvas.scrollIntoView({ block: 'center', behavior: 'instant' })")
    ActionChains(driver).drag_and_drop_by_offset(driver.find_elements(By.TAG_NAME, "canvas")[-1], -120, 0).perform()
    after = page.run(RANGE)
    assert after[0] > before[0]
    assert after[1] - after[0] == pytest.approx(before[1] - before[0])
    assert page.run("return s.timelines.every((one) => one.scene.view === s.view)"), "both timelines move together"


def test_two_fingers_zoom(show):
    page = show(Comparison("x", after=dualpipe(4, 8)))
    before = page.run(RANGE)
    page.run(
        "const frame = t.canvas.getBoundingClientRect();"
        "t.canvas.setPointerCapture = () => {};"
        "const touch = (kind, id, x) => t.canvas.dispatchEvent(new PointerEvent(kind, { pointerId: id, "
        "pointerType: 'touch', clientX: frame.left + x, clientY: frame.top + 60, bubbles: true }));"
        "touch('pointerdown', 1, 400); touch('pointerdown', 2, 600); touch('pointermove', 2, 900);"
        "touch('pointerup', 1, 400); touch('pointerup', 2, 900);"
    )
    start, end = page.run(RANGE)
    assert end - start == pytest.approx((before[1] - before[0]) * 200 / 500)


def test_the_counterexample_is_drawn_over_the_timeline(show, driver):
    from selenium.webdriver.common.by import By

    page = show(refuted(a_ring_sends_before_it_receives()))
    marks = driver.find_elements(By.CSS_SELECTOR, "svg.arrows > g")
    assert [mark.get_attribute("data-mark") for mark in marks] == ["0", "1", "2", "3"]
    ends = page.run(
        "return t.marks.map((mark, index) => {"
        "const path = t.node.querySelectorAll('path.shaft')[index], length = path.getTotalLength();"
        "const tip = path.getPointAtLength(length), tail = path.getPointAtLength(0);"
        "const [from, to] = [mark.at, mark.to].map(([number]) => t.boxOf(t.scene.schedule.ops[number]));"
        "const away = (point, box) => Math.hypot(point.x - box.middle, point.y - box.centre);"
        "return [away(tail, from), away(tip, to)];"
        "})"
    )
    assert len(ends) == 4
    assert all(distance < 20 for pair in ends for distance in pair), "from who waits to what it waits for"
    steps = driver.find_elements(By.CSS_SELECTOR, ".story li button")
    assert [step.text.split("\n")[-1].split(" (")[0] for step in steps] == [
        f"rank {rank} waits in slot {slot}" for rank, slot in enumerate((7, 8, 5, 2))
    ]
    driver.find_element(By.CSS_SELECTOR, "button[aria-pressed]").click()
    assert page.run("return t.node.querySelectorAll('svg.arrows > g').length") == 0


def test_a_deadlock_opens_on_its_counterexample_and_says_what_is_never_reached(show):
    page = show(refuted(receives_and_sends_not_coalesced()))
    start, end = page.run(RANGE)
    places = page.run("return t.marks.flatMap((m) => [...m.at, ...m.to]).map((n) => t.scene.schedule.ops[n].x0)")
    assert all(start <= place <= end for place in places)
    assert end - start < page.run("return t.scene.schedule.end"), "closer than the whole"
    page.point_at("2RB0>")
    assert "stuck here: rank 2 in slot 5 waits for rank 3 to post the partner of 2RB0>" in page.tooltip()
    page.point_at("3B1>")
    assert "not reached" in page.tooltip()


def test_the_dark_scheme_repaints_the_canvas_and_paper_is_light_and_shows_everything(show):
    page = show(Comparison("x", after=dualpipe(4, 8)))
    whole, light = page.run(RANGE), [0x86, 0xB9, 0xEE]
    assert page.pixel("0F0>") == light
    page.media(prefers_color_scheme="dark")
    assert page.colour("ground") == [0x12, 0x15, 0x1A]
    assert page.pixel("0F0>") == page.colour("f-1-of-2") != light
    page.run("s.view.zoom(4); dispatchEvent(new Event('beforeprint'));")
    assert page.run(RANGE) == pytest.approx(whole)
    assert page.pixel("0F0>") == light
    page.run("dispatchEvent(new Event('afterprint'))")
    assert page.pixel("0F0>") == page.colour("f-1-of-2") != light


def test_hostile_text_runs_nothing(show):
    hostile = "<img/src=x/onerror=window.hit=1></script><script>window.hit=1</script>"
    schedule = dualpipe(2, 4)
    named = Schedule(schedule.routes, schedule.programs, hostile)
    story = Counterexample(hostile, hostile, (Mark(0, 0, "", hostile, 1),))
    page = show(Comparison(hostile, named, named, hostile, hostile, (story,)))
    assert page.run("return window.hit ?? null") is None
    assert page.run("return document.querySelector('.story').innerText").count(hostile) == 1
    assert page.run("return document.querySelectorAll('img').length") == 0
