"""Timelines to draw: every named schedule, two ways of pricing it, and two odd ones."""

from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import loads
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.summary import parse_costs
from dualpipe.timeline.timeline import Timeline

INTERLEAVED = """schedule interleaved
lane > 0 1 0 1 0 1
rank 0: 0F0> 0SF0> 2RF0> 2F0> 2SF0> 4RF0> 4F0> 4SF0> 4RB0> 4B0>+4W0> 4SB0> 2RB0> 2B0>+2W0> 2SB0> 0RB0> 0B0>+0W0>
rank 1: 1RF0> 1F0> 1SF0> 3RF0> 3F0> 3SF0> 5RF0> 5F0> 5B0>+5W0> 5SB0> 3RB0> 3B0>+3W0> 3SB0> 1RB0> 1B0>+1W0> 1SB0>
"""

TIMELINES: dict[str, Timeline] = {
    "dualpipe": simulate(generate("dualpipe", 4, 10)),
    "dualpipe with credit for the overlap": simulate(generate("dualpipe", 8, 20), parse_costs("FB=2.5,latency=0.1")),
    "dualpipev": simulate(generate("dualpipev", 3, 8)),
    "1f1b, one cost for a full backward": simulate(generate("1f1b", 4, 12), parse_costs("B=2,BW=2")),
    "zb1p": simulate(generate("zb1p", 3, 6)),
    "weights that cost nothing": simulate(generate("zb1p", 2, 4), parse_costs("W=0")),
    "nothing costs anything": simulate(generate("dualpipe", 2, 4), parse_costs("F=0,B=0,W=0")),
    "three chunks per rank": simulate(loads(INTERLEAVED)),
    "blocking": simulate(generate("dualpipe", 4, 8), parse_costs("latency=0.5"), blocking=True),
    "no ops": simulate(loads("lane > 0\nrank 0:\n")),
}
