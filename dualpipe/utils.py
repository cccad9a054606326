"""A module of DeepSeek's package that programs written for it import from; see ``dualpipe.runtime.deepseek``."""

from dualpipe.runtime.deepseek import WeightGradStore, run_backward

__all__ = ["WeightGradStore", "run_backward"]
