"""Versions of the standard domain that torch's exporter writes."""

OLDEST = 18
"""Of those it writes by itself; older ones are made of it."""

NEWEST = 25
"""The last it can bring a model to."""
