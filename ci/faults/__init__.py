"""The gate tested by faults: those that real pipeline implementations shipped, planted in scratch clones of the tree.

    python -m ci.faults [--only TEXT] [--json]

The expected check must refuse each fault, and each harmless change must pass.
"""
