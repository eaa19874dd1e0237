"""What calibration inputs tell about the values of a program, gathered in few runs and little memory."""

from .calibration import Calibration
from .moments import Moments, Order, Source, moments_in_order
from .requests import KINDS, Request, linear_inputs
from .results import HistogramResult, Quantiles, Statistics, ValueStatistics

__all__ = [
    "KINDS",
    "Calibration",
    "HistogramResult",
    "Moments",
    "Order",
    "Quantiles",
    "Request",
    "Source",
    "Statistics",
    "ValueStatistics",
    "linear_inputs",
    "moments_in_order",
]
