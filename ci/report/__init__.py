"""The reports of a judgement: each a pure function of it; ``publish`` writes them."""
