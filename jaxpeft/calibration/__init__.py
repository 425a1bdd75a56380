"""Statistics of a few batches, from which data-driven methods start."""

from jaxpeft.calibration._statistics import Moments, input_moments, mean_gradients

__all__ = ["Moments", "input_moments", "mean_gradients"]
