"""The colours of a timeline: a hue for each kind of compute, a shade for each tone (see ``dualpipe.cells.Tone``).

Forward is blue, backward orange and weights grey, hues that every kind of colour blindness tells apart.  The first tone
is light and the last one dark, and within a tone forward is the darkest, so that a print in black and white tells too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dualpipe.schedule import B, F, Kind, W

Colour = str
"""As in CSS: ``#rrggbb``."""


class Shades(NamedTuple):
    """The ends between which the shades of a hue lie."""

    light: Colour
    dark: Colour


SHADES: Mapping[Kind, Shades] = {
    F: Shades("#86b9ee", "#113f78"),
    B: Shades("#ffc970", "#9e4c05"),
    W: Shades("#e4e4e4", "#6e6e6e"),
}
NAMES: Mapping[Kind, str] = {F: "forward", B: "backward", W: "weights"}
INK, GROUND, FAINT, HATCH = "#1b1f24", "#ffffff", "#f6f7f8", "#c3c9d0"
"""Of text and frames; of the picture; of a bubble and its hatching."""

_DARK = 140
"""Below this brightness, of 255, a ground takes light text."""


def colour(kind: Kind, tone: int, tones: int) -> Colour:
    """The shade of the ``tone``-th of so many tones; a schedule with one tone has the light one."""
    light, dark = map(_channels, SHADES[kind])
    part = tone / (tones - 1) if tones > 1 else 0.0
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(light, dark, strict=True))


def ink(ground: Colour) -> Colour:
    """The colour of text on a ground."""
    red, green, blue = _channels(ground)
    return GROUND if 0.299 * red + 0.587 * green + 0.114 * blue < _DARK else INK  # luma, as in ITU-R BT.601


def _channels(colour: Colour) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
