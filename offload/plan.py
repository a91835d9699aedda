"""What goes where, in bytes: pure arithmetic over a config's geometry, without torch.

Tiers: ``ram`` holds everything when there is no GPU; with one, ``vram`` holds resident weights, latent KV cache, slots
and scratch, and ``ram`` the process itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from model.config import Config
from slotmoe import PlanError

PREFILL_CHUNK = 512  # tokens; the same for every budget, so that logits don't depend on it
# The process grows this much between open and the first token: library pages, thread stacks, allocator slack.
RUNTIME_BYTES = 96 << 20
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``8GiB``, ``7.5GB`` or ``512MiB``; an integer is bytes already.  Raises ``PlanError``."""
    if isinstance(text, int) and not isinstance(text, bool):
        found: float = text
    else:
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", str(text))
        if not match or match[2].upper() not in _UNITS:
            raise PlanError(f"{str(text)[:40]!r} is not a size; write it like 8GiB, 7.5GB or 512MiB")
        found = float(match[1]) * _UNITS[match[2].upper()]
    if not 0 < found < 1 << 60:
        raise PlanError(f"{str(text)[:40]!r} is not a possible size; write it like 8GiB, 7.5GB or 512MiB")
    return int(found)


def format_size(count: float) -> str:
    """``count`` bytes for people: ``12.3 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def scratch_bytes(config: Config, expert_elements: int, value_bytes: int = 4) -> int:
    """Peak of a prefill chunk's temporaries: activations of every expert a token uses, one attention block, a
    dequantized slice of weights and one expert's dequantized projection."""
    T, D, H = PREFILL_CHUNK, config.hidden_size, config.num_attention_heads
    query = T * H * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    experts = T * config.num_experts_per_tok * D
    widest = max(config.intermediate_size, config.n_shared_experts * config.moe_intermediate_size, config.moe_intermediate_size)
    attention = 4 * max(1 << 22, T * H * 64)  # scores of one block and its expanded keys and values
    return value_bytes * (3 * query + experts + 6 * T * D + 3 * T * widest + attention + 4 * expert_elements + 3 * (1 << 22))


@dataclass(frozen=True)
class Plan:
    """The memory of one run.  ``components`` maps name to bytes on the fast tier; ``slots`` is the number of experts
    that stay there."""

    components: dict[str, int]
    slots: int
    record_bytes: int
    budget: int
    tier: str

    @property
    def total(self) -> int:
        return sum(self.components.values())


def make_plan(
    config: Config,
    *,
    tier: str,
    budget: int,
    fixed: dict[str, int],
    record_bytes: int,
    slots: int | None = None,
) -> Plan:
    """Spend ``budget`` bytes of ``tier`` on the ``fixed`` components and as many expert slots as remain, or on exactly
    ``slots`` of them.  Raises ``PlanError`` with the shortfall if not even one token's experts fit."""
    everything = len(config.moe_layers) * config.n_routed_experts
    least = config.num_experts_per_tok
    if slots is not None and not least <= slots:
        raise PlanError(f"{slots} expert slots are too few: one token uses {least} experts of a layer at once, give at least {least}")
    room = (budget - sum(fixed.values())) // record_bytes
    wanted = everything if slots is None else min(slots, everything)
    if room < (least if slots is None else wanted):
        needed = sum(fixed.values()) + (least if slots is None else wanted) * record_bytes
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in fixed.items())
        raise PlanError(
            f"needs at least {format_size(needed)} of {tier} ({parts}, {least if slots is None else wanted} expert slots "
            f"{format_size(record_bytes)} each), the budget is {format_size(budget)}, {format_size(needed - budget)} short: "
            f"raise --{tier}, lower --context, or quantize with --resident nf4"
        )
    count = min(room, wanted)
    return Plan({**fixed, "expert slots": count * record_bytes}, count, record_bytes, budget, tier)
