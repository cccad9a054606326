"""The six colours of a timeline are told apart by every kind of colour vision, in print, and from their text."""

import pytest

from dualpipe.schedule import B, F, W
from dualpipe.timeline.palette import DARK, GROUND, INK, LIGHT, colour, contrast, ink
from tests.pictures import seeing

APART = 25.0
"""Distance in CIELAB."""
SCHEMES = pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])


def six(scheme):
    return {(kind, tone): colour(kind, tone, 2, scheme) for kind in (F, B, W) for tone in (0, 1)}


@SCHEMES
@pytest.mark.parametrize("vision", seeing.VISIONS)
def test_all_six_are_far_apart(vision, scheme):
    assert seeing.nearest(six(scheme).values(), vision) >= APART


def test_green_beside_orange_would_be_refused():
    """The control: the colours that come to mind first."""
    planted = ["#9cc9f5", "#ffc66b", "#b7d98a", "#1f5fa8", "#a85208", "#4f7a1e"]
    assert seeing.nearest(planted, "protanopia") < APART


def test_lanes_differ_in_print_and_so_does_forward_within_a_lane():
    light = {key: float(seeing.lab(seeing.linear(text))[0]) for key, text in six(LIGHT).items()}
    assert min(light[kind, 0] for kind in (F, B, W)) - max(light[kind, 1] for kind in (F, B, W)) > 20
    for tone in (0, 1):
        assert light[F, tone] + 10 < min(light[B, tone], light[W, tone])


@SCHEMES
def test_text_has_the_contrast_that_accessibility_asks_for(scheme):
    """4.5 to 1 (WCAG 2.2, 1.4.3), also in the shades between the ends."""
    for kind in (F, B, W):
        for tones in range(1, 9):
            for tone in range(tones):
                ground = colour(kind, tone, tones, scheme)
                assert seeing.contrast(ground, ink(ground)) >= 4.5, (kind, tone, tones)


def test_the_contrast_is_what_wcag_defines():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for one in ("#777777", "#0a0a0a", LIGHT.shades[B].dark):
        assert contrast(one, GROUND) == pytest.approx(seeing.contrast(one, GROUND))
        assert contrast(one, GROUND) == contrast(GROUND, one)


@SCHEMES
def test_a_schedule_with_one_tone_has_the_light_one_and_three_have_one_between(scheme):
    light, dark = scheme.shades[F]
    assert colour(F, 0, 1, scheme) == light
    assert [colour(F, tone, 3, scheme) for tone in (0, 2)] == [light, dark]
    assert seeing.luminance(dark) < seeing.luminance(colour(F, 1, 3, scheme)) < seeing.luminance(light)
    assert ink(dark) == GROUND
    assert ink(light) == INK
