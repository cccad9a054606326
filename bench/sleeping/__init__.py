"""The parts of bench/bubble.py alone: a model that sleeps, and links that take their time."""
