"""rewright: makes neural networks smaller and faster by rewriting their graphs, with no silent step."""

__version__ = "0.1.0"
