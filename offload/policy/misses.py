"""Who computes an expert in no slot: the GPU, once it is copied, or the CPU.  Without torch.

Both go on at once, so the best split is the one whose slower side is done first.  It follows from
how fast records are copied and how fast the CPU kernels get through them, measured together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from slotmoe.offload.plan.speed import Bandwidths

MODES = ("auto", "fetch", "cpu", "hybrid")
# Up to so many tokens the CPU kernels are bound by reading the record; beyond, by arithmetic.
BOUND_TOKENS = 3


def cpu_cost(bandwidths: Bandwidths) -> float:
    """How many records are copied to the GPU while the CPU computes one for a token."""
    return bandwidths.pcie_busy / bandwidths.beside_gpu()


def choose_mode(wanted: str, bandwidths: Bandwidths, top_k: int) -> str:
    """``fetch``, ``cpu`` or ``hybrid``: as asked, or for ``auto`` what is best where all of a
    token's experts are missing."""
    if wanted != "auto":
        return wanted
    computed = for_cpu([1] * top_k, cpu_cost(bandwidths))
    return "fetch" if computed == 0 else "cpu" if computed == top_k else "hybrid"


def for_cpu(tokens: Sequence[int], cost: float) -> int:
    """How many of the missing experts the CPU computes, the first ones of ``tokens``: how many
    tokens want each, the fewest first.  The others are fetched.  ``cost`` is a ``cpu_cost``."""
    best, spent, least = 0, 0.0, float(len(tokens))
    for count, wanted in enumerate(tokens, 1):
        spent += cost * max(1.0, wanted / BOUND_TOKENS)
        both = max(spent, len(tokens) - count)
        if both < least:
            best, least = count, both
    return best


@dataclass(frozen=True)
class Split:
    """How missing experts are divided: ``mode`` is of ``choose_mode``, ``cost`` a ``cpu_cost``."""

    mode: str = "fetch"
    cost: float = 1.0

    def for_cpu(self, tokens: int, uses: Sequence[int], missing: int) -> int:
        """How many of a layer's absent experts the CPU computes, the first of ``uses``: how many of
        the pass's ``tokens`` use each, the fewest first.  ``missing`` counts what is coming too."""
        if tokens > 1:
            return for_cpu(uses, self.cost)
        if self.mode == "cpu":
            return len(uses)
        return min(len(uses), for_cpu([1] * missing, self.cost))
