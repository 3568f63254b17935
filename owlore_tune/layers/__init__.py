"""Layer scores, the layer sampler, and switching between sets of active layers."""

from owlore_tune.layers.active import ActiveLayers
from owlore_tune.layers.outliers import outlier_scores
from owlore_tune.layers.projected import ProjectedLayers
from owlore_tune.layers.sampler import LayerSampler
from owlore_tune.layers.scores import LayerScores, layer_scores

__all__ = ["ActiveLayers", "LayerSampler", "LayerScores", "ProjectedLayers", "layer_scores", "outlier_scores"]
