"""The parts of bench/bubble.py: a model that sleeps, its executors, and links that take their time."""
