"""Megatron is imported here, quietly, before a test module imports it by itself."""

import reference.megatron  # noqa: F401
