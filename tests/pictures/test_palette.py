"""The six colours of a picture are told apart by every kind of colour vision, in print, and from their text."""

from itertools import combinations

import numpy as np
import pytest

from dualpipe.palette import GROUND, INK, SHADES, colour, ink
from dualpipe.schedule import B, F, W

VISIONS = {  # full severity; Machado, Oliveira and Fernandes 2009, table 1, applied to linear RGB
    "common": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
APART = 25.0
"""Distance in CIELAB; one of 2.3 is just noticeable."""
COLOURS = {(kind, tone): colour(kind, tone, 2) for kind in (F, B, W) for tone in (0, 1)}


def linear(text: str) -> np.ndarray:
    """sRGB to linear RGB (IEC 61966-2-1)."""
    channels = np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """Linear RGB to CIELAB under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = to_xyz @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    fx, fy, fz = (np.cbrt(t) if t > 216 / 24389 else (24389 / 27 * t + 16) / 116 for t in (x, y, z))
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def nearest(colours, vision) -> float:
    seen = [lab(np.array(VISIONS[vision]) @ linear(text)) for text in colours]
    return min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2))


@pytest.mark.parametrize("vision", VISIONS)
def test_all_six_are_far_apart(vision):
    assert nearest(COLOURS.values(), vision) >= APART


def test_green_beside_orange_would_be_refused():
    """The control: the colours that come to mind first."""
    planted = ["#9cc9f5", "#ffc66b", "#b7d98a", "#1f5fa8", "#a85208", "#4f7a1e"]
    assert nearest(planted, "protanopia") < APART


def test_lanes_differ_in_print_and_so_does_forward_within_a_lane():
    light = {key: float(lab(linear(text))[0]) for key, text in COLOURS.items()}
    assert min(light[kind, 0] for kind in SHADES) - max(light[kind, 1] for kind in SHADES) > 20
    for tone in (0, 1):
        assert light[F, tone] + 10 < min(light[B, tone], light[W, tone])


def test_text_has_the_contrast_that_accessibility_asks_for():
    """4.5 to 1 (WCAG 2.2, 1.4.3), also in the shades between the ends."""
    for kind in (F, B, W):
        for tones in (1, 2):
            for tone in range(tones):
                ground = colour(kind, tone, tones)
                bright, dark = sorted((luminance(ground), luminance(ink(ground))), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) >= 4.5, (kind, tone)


def luminance(text: str) -> float:
    return float(linear(text) @ np.array([0.2126, 0.7152, 0.0722]))


def test_a_schedule_with_one_tone_has_the_light_one_and_three_have_one_between():
    assert colour(F, 0, 1) == SHADES[F].light
    assert [colour(F, tone, 3) for tone in (0, 2)] == list(SHADES[F])
    assert luminance(SHADES[F].dark) < luminance(colour(F, 1, 3)) < luminance(SHADES[F].light)
    assert ink(SHADES[F].dark) == GROUND
    assert ink(SHADES[F].light) == INK
