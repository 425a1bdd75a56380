"""Statistics of a few batches, for data-driven initializations and pruning scores."""

from jaxpeft.calibration._statistics import Moments, input_moments, mean_gradients

__all__ = ["Moments", "input_moments", "mean_gradients"]
