"""The gate tried by itself: faults that real pipeline implementations shipped, planted as patches in scratch clones.

    python -m ci.museum [--only TEXT] [--json]

Every fault must be refused by the check that should, every harmless change let through.
"""
