"""The colours of a page's timelines as CSS, from the palette that pictures and the terminal use too.

For every number of tones that the page's schedules have, custom properties::

    --f-1-of-2, --f-1-of-2-ink       a cell: its kind, its tone, how many tones its schedule has
    --f-line, --b-line, --w-line     a thin line: a message that feeds the kind, or the frame of what is not reached
    --bubble, --hatch                where a rank waits
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dualpipe.schedule import B, F, W
from dualpipe.timeline.palette import DARK, LIGHT, Colour, Scheme, colour, ink, line


def style(counts: Iterable[int]) -> str:
    """The properties for schedules with these numbers of tones: light ones, and dark ones used only on dark screens."""
    numbers = sorted(set(counts))
    light, dark = (_declarations(scheme, numbers) for scheme in (LIGHT, DARK))
    return (
        f":root {{\n{light}}}\n"
        f"@media screen and (prefers-color-scheme: dark) {{\n:root:not([data-printing]) {{\n{dark}}}\n}}\n"
    )


def _declarations(scheme: Scheme, counts: Iterable[int]) -> str:
    return "".join(f"--{name}: {value};\n" for name, value in _properties(scheme, counts))


def _properties(scheme: Scheme, counts: Iterable[int]) -> Iterator[tuple[str, Colour]]:
    grounds = {f"{kind.lower()}-line": line(kind, scheme) for kind in (F, B, W)}
    for tones in counts:
        for tone in range(tones):
            for kind in (F, B, W):
                grounds[f"{kind.lower()}-{tone + 1}-of-{tones}"] = colour(kind, tone, tones, scheme)
    for name, ground in grounds.items():
        yield name, ground
        yield f"{name}-ink", ink(ground)
    yield "bubble", scheme.faint
    yield "hatch", scheme.hatch
