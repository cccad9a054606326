"""A module of DeepSeek's package that programs written for it import from; see ``dualpipe.deepseek``."""

from dualpipe.deepseek import WeightGradStore, run_backward

__all__ = ["WeightGradStore", "run_backward"]
