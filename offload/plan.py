"""What goes where, in bytes: pure arithmetic over a config's geometry, without torch.

Tiers: ``ram`` holds everything when there is no GPU; with one, ``vram`` holds resident weights, latent KV cache, slots
and scratch, and ``ram`` the process itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from model.config import Config
from slotmoe import PlanError

PREFILL_CHUNK = 512  # tokens of a prefill pass; the same for every budget where logits depend on it
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


def scratch_bytes(config: Config, expert_elements: int, value_bytes: int = 4, chunk: int = PREFILL_CHUNK) -> int:
    """Peak of a prefill chunk's temporaries: activations of every expert a token uses, one attention block, a
    dequantized slice of weights and one expert's dequantized projection."""
    T, D, H = chunk, config.hidden_size, config.num_attention_heads
    query = T * H * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    experts = T * config.num_experts_per_tok * D
    widest = max(config.intermediate_size, config.n_shared_experts * config.moe_intermediate_size, config.moe_intermediate_size)
    attention = 4 * max(1 << 22, T * H * 64)  # scores of one block and its expanded keys and values
    return value_bytes * (3 * query + experts + 6 * T * D + 3 * T * widest + attention + 4 * expert_elements + 3 * (1 << 22))


def prefill_chunk(config: Config, expert_elements: int, context: int, room: int) -> int:
    """Tokens of a prefill pass where a row's result does not depend on the others.  Each pass brings every expert that it
    needs once, so a longer one reads less; its scratch may take a twentieth of the ``room`` that experts would get."""
    base, best = scratch_bytes(config, expert_elements), PREFILL_CHUNK
    while 2 * best <= min(context, 4096) and scratch_bytes(config, expert_elements, chunk=2 * best) - base <= room // 20:
        best *= 2
    return best


@dataclass(frozen=True)
class Plan:
    """The memory of one run.  ``components`` maps name to bytes on the fast tier ``tier``: ``slots`` experts stay there and
    ``transit`` more are on their way in or being used once.  With a GPU, ``host`` is the same for RAM, where
    ``host_slots`` experts stay.  A prefill pass takes ``prefill_chunk`` tokens."""

    components: dict[str, int]
    slots: int
    transit: int
    record_bytes: int
    budget: int
    tier: str
    host: dict[str, int] = field(default_factory=dict)
    host_slots: int = 0
    prefill_chunk: int = PREFILL_CHUNK

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
    host_budget: int | None = None,
    host_fixed: dict[str, int] | None = None,
    chunk: int = PREFILL_CHUNK,
) -> Plan:
    """Spend ``budget`` bytes of ``tier`` on the ``fixed`` components, read buffers, and as many expert slots as remain, or
    exactly ``slots`` of them; and ``host_budget`` bytes of RAM below a GPU likewise.  Raises ``PlanError`` with the
    shortfall if not even one token's experts fit."""
    everything, top_k = len(config.moe_layers) * config.n_routed_experts, config.num_experts_per_tok
    if slots is not None and slots < top_k:
        raise PlanError(f"{slots} expert slots are too few: one token uses {top_k} experts of a layer at once, give at least {top_k}")
    wanted = everything if slots is None else min(slots, everything)
    room = (budget - sum(fixed.values())) // record_bytes
    count, transit = _divide(room, wanted, everything, top_k)
    least = top_k if slots is None else wanted
    if count < least:
        least += 0 if least == everything else top_k
        needed = sum(fixed.values()) + least * record_bytes
        parts = ", ".join(f"{name} {format_size(size)}" for name, size in fixed.items())
        raise PlanError(
            f"needs at least {format_size(needed)} of {tier} ({parts}, {least} expert slots and read buffers of "
            f"{format_size(record_bytes)} each), the budget is {format_size(budget)}, {format_size(needed - budget)} short: "
            f"raise --{tier}, lower --context, or quantize with --resident nf4"
        )
    components = {**fixed, "expert slots": count * record_bytes, "read buffers": min(transit, everything - count) * record_bytes}
    host: dict[str, int] = {}
    host_slots = 0
    if host_budget is not None and host_fixed is not None:
        room = (host_budget - sum(host_fixed.values())) // record_bytes
        host_slots = max(0, min(room - transit, everything))
        if room < transit:
            needed = sum(host_fixed.values()) + transit * record_bytes
            raise PlanError(
                f"needs at least {format_size(needed)} of ram ({transit} read buffers of {format_size(record_bytes)} each), the "
                f"budget is {format_size(host_budget)}: raise --ram"
            )
        host = {**host_fixed, "expert slots": host_slots * record_bytes, "read buffers": transit * record_bytes}
    return Plan(components, count, transit, record_bytes, budget, tier, host, host_slots, chunk)


def _divide(room: int, wanted: int, everything: int, top_k: int) -> tuple[int, int]:
    """How many of ``room`` records are slots, at most ``wanted``, and how many are read buffers.

    A layer's demand needs ``top_k`` buffers; up to three times as many more hold what is read ahead, but never more than
    an eighth of the room.  If everything fits, each expert has its slot and buffers take no memory of their own.
    """
    if room >= everything and wanted == everything:
        return everything, 4 * top_k
    transit = min(4 * top_k, max(top_k, room // 8 if wanted == everything else room - wanted))
    return min(wanted, room - transit), transit
