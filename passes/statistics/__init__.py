"""What calibration inputs tell about the values of a program, gathered in few runs and little memory."""

from .calibration import Calibration
from .cross import cross_grams
from .requests import KINDS, Request, linear_inputs
from .results import HistogramResult, Quantiles, Statistics, ValueStatistics

__all__ = ["KINDS", "Calibration", "HistogramResult", "Quantiles", "Request", "Statistics", "ValueStatistics", "cross_grams", "linear_inputs"]
