"""Simulation on ideal ranks: the public names of ``dualpipe.timeline.simulate``."""

from dualpipe.timeline.simulate import CostError, Costs, Message, Span, Stuck, Timeline, Wait, simulate

__all__ = ["CostError", "Costs", "Message", "Span", "Stuck", "Timeline", "Wait", "simulate"]
