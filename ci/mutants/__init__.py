"""Small faults planted at random, one at a time: which does no test notice?

``mutation`` draws them, with the operators of cosmic-ray and one of ours; ``runner`` runs the tests on each in a copy
of the tree.  This measures the tests, and is not part of the gate or of CI.
"""
