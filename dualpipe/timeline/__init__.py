"""When everything happens: simulated and measured timelines, and what draws them."""
