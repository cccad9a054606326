"""The drop-in for Megatron-core: DualPipe behind ``--use-dualpipe``.

Importing this package imports neither torch nor megatron: each of its modules imports what it needs.
"""
