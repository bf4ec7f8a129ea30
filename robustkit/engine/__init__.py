"""The inner loop: the prediction path, statistics over the global batch, and the count of passes."""

from robustkit.engine.counting import count_passes
from robustkit.engine.predictor import ModulePredictor, Predictor, autocast, float_output
from robustkit.engine.statistics import GlobalStatistics

__all__ = ["GlobalStatistics", "ModulePredictor", "Predictor", "autocast", "count_passes", "float_output"]
