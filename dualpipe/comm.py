"""A module of DeepSeek's package that programs written for it import from; see ``dualpipe.runtime.deepseek``."""

from dualpipe.runtime.deepseek import set_p2p_tensor_dtype, set_p2p_tensor_shapes

__all__ = ["set_p2p_tensor_dtype", "set_p2p_tensor_shapes"]
