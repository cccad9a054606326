"""Messages for an order of computes: the public names of ``dualpipe.schedule.lower``."""

from dualpipe.schedule.lower import Blocked, OrderError, lower

__all__ = ["Blocked", "OrderError", "lower"]
