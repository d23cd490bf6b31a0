"""Inner optimizers of other libraries that the core treats in a way of their own.

Only names are here, so that no library is imported.
"""

from deltaopt.in_backward import STEPS_IN_BACKWARD
from deltaopt.inner import LEAVES_FROZEN_ALONE

LEAVES_FROZEN_ALONE.add(("peft.optimizers.lorafa", "LoraFAOptimizer"))
STEPS_IN_BACKWARD.update(
    {
        "fused_backward": "LOMO and AdaLOMO",
        "optimizer_dict": 'the layerwise optimizers of transformers (optim="galore_adamw_layerwise")',
        "optim_map": "torchtune's optimizer_in_bwd",
    }
)
