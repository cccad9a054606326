"""The reports of an evaluation: each a pure function of it; ``publish`` writes them."""
