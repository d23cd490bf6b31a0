"""Results of a whole grid that nobody has trained: for tests of what is made of them, and to look at pictures."""

import math
import random

from benchmarks.evidence.result import Result

LAYERS = [f"encoder.layer.{i}.attention.self.{kind}" for i in range(3) for kind in ("query", "value")]
BEST = {"full": 0.3, "lora": 0.0, "delta": 0.01, "alpha": 0.01, "sgd": -0.6}
"""By how much a row is better than LoRA, in spreads."""


def made(setting, metrics=None, scored=True):
    """Return the result of a setting: a parabola over log lr, noise that rows share, and some more of their own."""
    shared = random.Random(f"{setting.task} {setting.seed} {setting.split}")
    own = random.Random(setting.digest)
    centre = -3.9 if setting.method.startswith("full") else -1.8 if setting.method == "sgd" else -2.4
    off = math.log10(setting.lr) - centre + (0.4 if setting.row in ("delta", "alpha") else 0)
    quality = 1 - 0.4 * off**2 + 0.1 * BEST.get(setting.row, 0.02) + 0.02 * shared.gauss(0, 1) + 0.01 * own.gauss(0, 1)
    result = Result(setting, data=f"{setting.task} {setting.split}", trained=1000 * setting.rank, total=50_000)
    result.machine = {"device": "cpu", "cpu": "A Processor", "torch_threads": 1}
    result.versions, result.commit = {"torch": "2", "python": "3"}, "abc"
    result.seconds, result.step_seconds = 60.0, 0.2 + 0.01 * own.random()
    points = math.ceil(setting.steps / 10)
    result.losses = [2 * math.exp(-3 * quality * i / points) + 0.05 * own.random() for i in range(points)]
    if off > 1.2:
        result.diverged, result.losses = True, result.losses[:3]
        return result
    names = metrics or {"stsb": ["pearson", "spearman"], "cola": ["matthews"], "mrpc": ["accuracy", "f1"]}.get(
        setting.task, [] if setting.task in ("e2e", "webnlg") else ["accuracy"]
    )
    result.metrics = {"loss": 1.6 - quality, **{name: min(0.99, 0.85 * quality) for name in names}}
    if not names:
        result.forgetting = (1.0, 1.1 + 0.2 * (off + 1) ** 2)
        if setting.split == "test" and scored:
            units = {"BLEU": 60, "NIST": 8, "METEOR": 45, "ROUGE-L": 70, "CIDEr": 2, "TER": 40}
            result.metrics |= {name: unit * quality for name, unit in units.items()}
    turned = 1e-3 * 10**off
    result.layers = [
        {
            "name": name,
            "base_norm": 1.0,
            "weight_norm": 0.1,
            "branch_norm": 0.1,
            "change_norm": 0.2,
            "cosine": 1 - turned * (1 + i % 3),
            "weight_cosine": 1.0,
            "effective_rank": setting.rank * (0.5 + 0.1 * own.random()),
            "numerical_rank": setting.rank,
        }
        for i, name in enumerate(LAYERS)
    ]
    return result


def complete(grid, **more):
    """Return the results of a grid from its first run to its last."""
    results = []
    while needed := grid.needed(results):
        results += [made(setting, **more) for setting in needed]
    return results
