"""Imports Megatron without its known warnings, before a test module imports it."""

import reference.megatron  # noqa: F401
