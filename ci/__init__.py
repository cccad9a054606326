"""The gate: shows what a change does to the schedules, and lets nothing in that is not shown to be right.

The gate itself imports nothing of the tree that it judges: whatever a change broke, it is looked at from other
processes, each with a time limit.
"""
