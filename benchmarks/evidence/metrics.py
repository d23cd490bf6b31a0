"""The metrics of labels and numbers, as shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor


def measure(names: Sequence[str], predicted: Tensor, expected: Tensor) -> dict[str, float]:
    """Return the metrics of these names.

    Raises:
        ModuleNotFoundError: if scikit-learn or scipy is not installed.
    """
    try:
        import scipy.stats
        import sklearn.metrics
    except ImportError as error:
        raise ModuleNotFoundError(f"metrics need {error.name}: pip install scikit-learn scipy") from error

    def correlation(function: Callable[..., Any]) -> float:
        # Equal predictions for all correlate with nothing.
        return float(function(expected, found)[0]) if len(set(found)) > 1 else 0.0

    found, expected = predicted.tolist(), expected.tolist()
    metrics: dict[str, Callable[[], float]] = {
        "accuracy": lambda: sklearn.metrics.accuracy_score(expected, found),
        "f1": lambda: sklearn.metrics.f1_score(expected, found, zero_division=0.0),
        "matthews": lambda: sklearn.metrics.matthews_corrcoef(expected, found),
        "pearson": lambda: correlation(scipy.stats.pearsonr),
        "spearman": lambda: correlation(scipy.stats.spearmanr),
    }
    return {name: float(metrics[name]()) for name in names}
