"""Small faults planted at random, one at a time: which does no test notice?

``mutation`` draws them, with the operators of cosmic-ray and one of ours; ``trial`` runs the tests on each in a copy of
the tree.  It measures the tests, and is no part of the gate or of CI.
"""
