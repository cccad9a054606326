"""The colours of a timeline: a hue for each kind of compute, a shade for each ``dualpipe.timeline.chart.Tone``.

Forward is blue, backward orange and weights grey, hues that differ under every kind of colour blindness.  The first
tone is light and the last one dark, and within a tone forward is the darkest, so it is readable in black and white.

Pictures and the terminal use the ``LIGHT`` scheme; the page uses ``DARK`` on a dark screen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from dualpipe.schedule import B, F, Kind, W

Colour = str
"""As in CSS: ``#rrggbb``."""


class Shades(NamedTuple):
    """The lightest and the darkest shade of a hue."""

    light: Colour
    dark: Colour


class Scheme(NamedTuple):
    """The colours of timelines on one background.

    Attributes
    ----------
    shades:
        The hue of each kind.
    faint, hatch:
        The colours of a bubble and of its hatching.
    line:
        Where between light (0) and dark (1) thin lines are; near one of the ends they would be hard to see.
    """

    shades: Mapping[Kind, Shades]
    faint: Colour
    hatch: Colour
    line: float


LIGHT = Scheme(
    {F: Shades("#86b9ee", "#113f78"), B: Shades("#ffc970", "#9e4c05"), W: Shades("#e4e4e4", "#6e6e6e")},
    faint="#f6f7f8",
    hatch="#c3c9d0",
    line=2 / 3,
)
DARK = Scheme(
    {F: Shades("#7cb0ea", "#2460b4"), B: Shades("#eaad52", "#a04f08"), W: Shades("#d0d0d0", "#727272")},
    faint="#191d24",
    hatch="#3b434f",
    line=1 / 3,
)
NAMES: Mapping[Kind, str] = {F: "forward", B: "backward", W: "weights"}
INK, GROUND = "#1b1f24", "#ffffff"
"""The colour of text and frames; that of the background, and of text on a dark shade."""

_BLACK = "#000000"
_READABLE = 4.5
"""The least contrast of readable text (WCAG 2.2, 1.4.3)."""


def colour(kind: Kind, tone: int, tones: int, scheme: Scheme = LIGHT) -> Colour:
    """The shade of the ``tone``-th of ``tones`` tones; a schedule with one tone has the light one."""
    return _between(scheme.shades[kind], tone / (tones - 1) if tones > 1 else 0.0)


def line(kind: Kind, scheme: Scheme = LIGHT) -> Colour:
    """The colour of a thin line that belongs to a kind, such as a message that feeds it."""
    return _between(scheme.shades[kind], scheme.line)


def ink(ground: Colour) -> Colour:
    """The colour of text on a background.  Black is for the few medium shades on which the other two are unreadable."""
    return next((text for text in (INK, GROUND) if contrast(text, ground) >= _READABLE), _BLACK)


def contrast(one: Colour, other: Colour) -> float:
    """The contrast ratio of two colours, from 1 to 21, as WCAG 2.2 defines it."""
    dark, light = sorted(map(_luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def _between(shades: Shades, part: float) -> Colour:
    light, dark = map(_channels, shades)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(light, dark, strict=True))


def _luminance(colour: Colour) -> float:
    """Relative to white, of an sRGB colour (WCAG 2.2)."""
    channels = (channel / 255 for channel in _channels(colour))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _channels(colour: Colour) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
