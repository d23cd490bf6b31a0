"""How each layer has changed: norms, cosines to the pretrained weight (Fig. 3 of the paper), ranks; and their plots."""

from deltaopt.analysis.changes import LayerChange, dense_changes, layer_changes
from deltaopt.analysis.history import History
from deltaopt.analysis.plots import plot_cosines, plot_history, plot_ranks

__all__ = ["History", "LayerChange", "dense_changes", "layer_changes", "plot_cosines", "plot_history", "plot_ranks"]
