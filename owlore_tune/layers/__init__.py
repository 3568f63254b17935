"""Which layers train: scores, the sampler, the layers in the projected form, and the schedule."""

from owlore_tune.layers.outliers import outlier_scores
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.layers.schedule import Schedule
from owlore_tune.layers.scores import LayerScores, layer_scores

__all__ = ["LayerSampler", "LayerScores", "ProjectedLayers", "Schedule", "layer_scores", "outlier_scores"]
