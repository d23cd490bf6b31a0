"""What `save_adapter` tells of the adapter that it wrote: the errors, and the rank that a server has to allow."""

from __future__ import annotations

from collections.abc import Mapping

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for ``--max-lora-rank``."""


class SavedAdapter(dict[str, float]):
    """The relative error of each layer's change, by name of the triple; printed, it says the rank.

    Args:
        errors: by name of the triple.
        ranks: that were written, by name of the triple.
        trained: the largest rank that trained.

    Attributes:
        ranks: as given.
        trained: as given.
    """

    def __init__(self, errors: Mapping[str, float], ranks: Mapping[str, int], trained: int) -> None:
        super().__init__(errors)
        self.ranks = dict(ranks)
        self.trained = trained

    @property
    def rank(self) -> int:
        """The largest rank, which a server has to allow."""
        return max(self.ranks.values())

    @property
    def server(self) -> str:
        """What to allow in vLLM, in words: the smallest of its values that is large enough."""
        fits = [rank for rank in VLLM_RANKS if rank >= self.rank]
        return f"vLLM: --max-lora-rank {fits[0]}" if fits else f"vLLM takes no rank above {VLLM_RANKS[-1]}"

    def __repr__(self) -> str:
        lowest, error = min(self.ranks.values()), max(self.values())
        ranks = f"rank {self.rank}" if lowest == self.rank else f"ranks from {lowest} to {self.rank}"
        trained = "" if self.rank == self.trained else f" (trained with rank {self.trained})"
        return f"adapter of {ranks}{trained}, largest relative error {error:.2g}; {self.server}"
