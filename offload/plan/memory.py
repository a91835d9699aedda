"""What goes where, in bytes: pure arithmetic over a config's geometry, without torch.

Tiers: ``ram`` holds everything when there is no GPU; with one, ``vram`` holds resident weights,
latent KV cache, slots and scratch, and ``ram`` the process itself and a host tier of experts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from slotmoe.errors import PlanError
from slotmoe.model.config import Config
from slotmoe.model.names import EMBEDDING, component_of, resident_shapes, role_of
from slotmoe.quant.shapes import latent_bytes, padded_record_bytes, resident_bytes

PREFILL_CHUNK = 512  # tokens of a prefill pass; the same for every budget where logits depend on it
# records lent to the CPU at once in prefill: one that is computed with, the others on their way
# from disk
LENT = 4
SPLITS, FEW = (
    64,
    16,
)  # of the Triton kernels: programs that share a context, tokens that attend one by one
CUBLAS_BYTES = (
    8 << 20
)  # its workspace, which torch's allocator gives; 32 MiB on compute capability 9.0
LEVELS_BYTES = 64  # the 16 levels of the export's 4-bit codes
HELP_BYTES = (
    128 << 10
)  # a record this small is read by the waiting thread itself: waking another costs more
# What importing the libraries takes, measured with torch 2.13 for CPUs; a running process knows its
# own figure.
IMPORT_BYTES = 226 << 20
CUDA_IMPORT_BYTES = 1 << 30
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {
    "K": 1 << 10,
    "M": 1 << 20,
    "G": 1 << 30,
    "T": 1 << 40,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``8GiB``, ``7.5GB`` or ``512MiB``; an integer is bytes already.
    Raises ``PlanError``."""
    if isinstance(text, int) and not isinstance(text, bool):
        found: float = text
    else:
        match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", str(text))
        if not match or match[2].upper() not in _UNITS:
            raise PlanError(
                f"{str(text)[:40]!r} is not a size; write it like 8GiB, 7.5GB or 512MiB"
            )
        found = float(match[1]) * _UNITS[match[2].upper()]
    if not 0 < found < 1 << 60:
        raise PlanError(
            f"{str(text)[:40]!r} is not a possible size; write it like 8GiB, 7.5GB or 512MiB"
        )
    return int(found)


def format_size(count: float) -> str:
    """``count`` bytes for people: ``12.3 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts: ``resident`` weights in memory by component, those of them that one
    decoded token ``touched``, and one expert's record."""

    resident: dict[str, int]
    touched: int
    record_bytes: int


def sizes_of(config: Config, resident: str, predictor_bytes: int = 0) -> Sizes:
    """Sizes of an export whose resident weights are ``bf16``, ``int8`` or ``nf4``."""
    components: dict[str, int] = {}
    for name, shape in resident_shapes(config).items():
        key = component_of(name)
        components[key] = components.get(key, 0) + resident_bytes(role_of(name), shape, resident)
    total, table = sum(components.values()), resident_shapes(config)[EMBEDDING]
    if predictor_bytes:
        components["predictor"] = predictor_bytes
    tied = config.tie_word_embeddings
    untouched = 0 if tied else resident_bytes("embedding", table, resident)
    return Sizes(
        components,
        total - untouched,
        padded_record_bytes(config.hidden_size, config.moe_intermediate_size),
    )


def kv_bytes(config: Config, positions: int, kernels: str = "native", value_bytes: int = 2) -> int:
    """Bytes of the latent KV cache for so many positions: ``kv_lora_rank + qk_rope_head_dim``
    values a layer each, which ``native`` kernels keep in 8 bits, with 16 bytes of scales and sums a
    row, and others in ``value_bytes``."""
    row = (
        latent_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
        if kernels == "native"
        else config.latent_width * value_bytes
    )
    return config.num_hidden_layers * positions * row


def runtime_growth(config: Config, resident: int) -> int:
    """Bytes that the process takes beside its parts once it has run: pages of libraries and thread
    stacks, the manifest's records, and what is lost at the ends of large pages that hold
    ``resident`` bytes of weights.  Fitted to measured peaks."""
    return (14 << 20) + 2048 * len(config.moe_layers) * config.n_routed_experts + resident // 50


def scratch_bytes(
    config: Config, tokens: int, kernels: str = "native", value_bytes: int = 4
) -> int:
    """Peak in bytes of the temporaries of a prefill pass over ``tokens`` tokens; an upper bound, at
    most a quarter too large at real geometries.

    With ``native`` kernels: queries before and after absorption and the attention's output, then
    the outputs of every expert that a token uses; freed blocks of one kind rarely serve the other.
    With ``torch``: one block of scores with its expanded keys and values, and a dequantized slice
    of weights.  For ``triton`` see ``_card_scratch``.
    """
    c, T, D, H = config, tokens, config.hidden_size, config.num_attention_heads
    if kernels == "native":
        query = H * (c.qk_nope_head_dim + c.qk_rope_head_dim) + (H + 1) * c.qk_rope_head_dim
        attention = 2 * D + query + H * (3 * c.kv_lora_rank + c.qk_rope_head_dim)
        return (2 << 20) + 4 * T * (attention + D * (c.num_experts_per_tok + 4))
    if kernels == "triton":
        return _card_scratch(config, tokens)
    query = T * H * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    widest = max(
        c.intermediate_size, c.n_shared_experts * c.moe_intermediate_size, c.moe_intermediate_size
    )
    scores = 4 * max(1 << 22, T * H * 64)
    weights = 4 * D * c.moe_intermediate_size + 3 * (1 << 22)
    return value_bytes * (
        3 * query + T * D * (c.num_experts_per_tok + 6) + 3 * T * widest + scores + weights
    )


def _card_scratch(c: Config, T: int) -> int:
    """The same with Triton's kernels, where a pass has all its temporaries from one allocator,
    which gives what was freed to whoever asks next: the largest of its parts, and what lasts.

    Attention: the residual stream and its norm, the queries and copies of them, the output and its
    sums, two blocks of scores, and two blocks of expanded keys and values, which are the larger the
    fewer tokens there are; up to ``few`` tokens deep in a context go through the absorbed form,
    whose queries are wide.  Experts: the outputs by use, twice, and what is between their
    projections.
    """
    D, H, K, R = c.hidden_size, c.num_attention_heads, c.num_experts_per_tok, c.kv_lora_rank
    head, P, V = c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    each = c.qk_nope_head_dim + V
    few = min(T, R * each // max(1, 2 * R - each))

    def attention(tokens: int, key: int, value: int, expanded: int) -> int:
        block = min(4096, max(64, (1 << 22) // (tokens * H)))  # of cached rows
        rows = 2 * D + H * (3 * key + 4 * value) + (H + 1) * P
        return 4 * tokens * rows + 8 * tokens * H * block + 4 * block * H * expanded

    expanded, splits = (
        2 * (each + head),
        4 * H * SPLITS * (R + 2),
    )  # the latter are partial sums of one token's attention
    parts = (
        attention(T, head, V, expanded),
        attention(few, head, V, expanded),
        attention(few, R + P, R, 0),
        T * (12 * D + K * (8 * D + 2 * c.moe_intermediate_size)),
        FEW * splits,
    )
    return max(parts) + splits + CUBLAS_BYTES


def _prefill_chunk(config: Config, context: int, room: int) -> int:
    """Tokens of a prefill pass where a row's result does not depend on the others.  Each pass
    brings every expert that it needs once, so a longer one reads less; its scratch may take a
    twentieth of the ``room`` that experts would get."""
    base, best = scratch_bytes(config, PREFILL_CHUNK), PREFILL_CHUNK
    while 2 * best <= min(context, 4096) and scratch_bytes(config, 2 * best) - base <= room // 20:
        best *= 2
    return best


@dataclass(frozen=True)
class Plan:
    """The memory of one run.  ``components`` maps name to bytes on the fast tier ``tier``:
    ``slots`` experts stay there and ``transit`` more are on their way in or being used once.  With
    a GPU, ``host`` is the same for RAM, where ``host_slots`` experts stay and ``host_transit`` more
    are on their way or lent to the CPU.  A prefill pass takes ``prefill_chunk`` tokens.
    ``shortfall`` is what the least number of slots needs beyond the budget, by tier: empty if the
    plan works."""

    components: dict[str, int]
    slots: int
    transit: int
    record_bytes: int
    budget: int
    tier: str
    context: int
    prefill_chunk: int = PREFILL_CHUNK
    host: dict[str, int] = field(default_factory=dict)
    host_slots: int = 0
    host_transit: int = 0
    host_budget: int = 0
    shortfall: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.components.values())

    def check(self) -> Plan:
        """The plan itself; raises ``PlanError`` with the shortfall if not even one token's experts
        fit."""
        for tier, missing in self.shortfall.items():
            fast = tier == self.tier
            components, budget = (
                (self.components, self.budget) if fast else (self.host, self.host_budget)
            )
            parts = ", ".join(
                f"{name} {format_size(size)}" for name, size in components.items() if size
            )
            raise PlanError(
                f"needs at least {format_size(budget + missing)} of {tier} ({parts}), the budget is {format_size(budget)}, "
                f"{format_size(missing)} short: raise --{tier}"
                + (", lower --context, or quantize with --resident nf4" if fast else "")
            )
        return self


def make_plan(
    config: Config,
    sizes: Sizes,
    *,
    tier: str,
    budget: int,
    context: int,
    runtime_bytes: int,
    slots: int | None = None,
    host_budget: int | None = None,
    kernels: str = "native",
    logits_rows: int = 1,
    sequences: int = 1,
) -> Plan:
    """Spend ``budget`` bytes of ``tier`` on what is resident, read buffers, and as many expert
    slots as remain, or exactly ``slots`` of them; and ``host_budget`` bytes of RAM below a GPU
    likewise.  ``runtime_bytes`` is what the process holds before a model is opened; ``logits_rows``
    rows of logits are in memory at once, and the latents of ``sequences`` sequences of ``context``
    positions.  With other ``kernels`` than native ones (``scratch_bytes``) a prefill pass keeps one
    length.  A plan that doesn't fit has a ``shortfall``; raises ``PlanError`` for slots that can't
    serve one token."""
    everything, top_k = len(config.moe_layers) * config.n_routed_experts, config.num_experts_per_tok
    if slots is not None and slots < top_k:
        raise PlanError(
            f"{slots} expert slots are too few: one token uses {top_k} experts of a layer at once, give at least {top_k}"
        )
    runtime = {"runtime": runtime_bytes + runtime_growth(config, sum(sizes.resident.values()))}
    fixed = {
        **sizes.resident,
        "latent KV cache": sequences * kv_bytes(config, context, kernels),
        "logits": 4 * logits_rows * config.vocab_size,
    }
    fixed |= runtime if tier == "ram" else {"slot table": 4 * everything + LEVELS_BYTES}
    scratch, chunk = (
        scratch_bytes(config, PREFILL_CHUNK, kernels, 4 if tier == "ram" else 6),
        PREFILL_CHUNK,
    )
    room = budget - sum(fixed.values()) - scratch
    if kernels == "native" and (slots is not None or room < everything * sizes.record_bytes):
        chunk = _prefill_chunk(config, context, room)
        scratch = scratch_bytes(config, chunk)
    fixed["prefill scratch"] = scratch
    count, transit = _divide(
        (budget - sum(fixed.values())) // sizes.record_bytes, slots, everything, top_k
    )
    least = min(slots or top_k, everything)
    if count < least:
        count, transit = least, top_k
    buffers = min(transit, everything - count)
    components = {
        **fixed,
        "expert slots": count * sizes.record_bytes,
        "read buffers": buffers * sizes.record_bytes,
    }
    shortfall = {tier: sum(components.values()) - budget}
    host, host_slots, host_transit = dict[str, int](), 0, 0
    if host_budget is not None:
        room, host_transit = (
            (host_budget - sum(runtime.values())) // sizes.record_bytes,
            transit + max(top_k, LENT),
        )
        host_slots = max(0, min(room - host_transit, everything)) if count < everything else 0
        host = {
            **runtime,
            "expert slots": host_slots * sizes.record_bytes,
            "read buffers": host_transit * sizes.record_bytes,
        }
        shortfall["ram"] = sum(host.values()) - host_budget
    return Plan(
        components,
        count,
        transit,
        sizes.record_bytes,
        budget,
        tier,
        context,
        chunk,
        host,
        host_slots,
        host_transit,
        host_budget or 0,
        {tier: missing for tier, missing in shortfall.items() if missing > 0},
    )


def _divide(room: int, slots: int | None, everything: int, top_k: int) -> tuple[int, int]:
    """How many of ``room`` records are slots, at most ``slots``, and how many are read buffers.

    A layer's demand needs ``top_k`` buffers; up to three times as many more hold what is read
    ahead, but never more than an eighth of the room.  If everything fits, each expert has its slot
    and buffers take no memory of their own.
    """
    wanted = everything if slots is None else min(slots, everything)
    if room >= everything and wanted == everything:
        return everything, 4 * top_k
    transit = min(4 * top_k, max(top_k, room // 8 if wanted == everything else room - wanted))
    return min(wanted, room - transit), transit


def predicted_components(
    plan: Plan, prompt_tokens: int, new_tokens: int
) -> dict[str, dict[str, int]]:
    """Name -> tier -> bytes at the peak of a run: the plan, less positions that it never reaches
    and what shorter prefill passes need less."""
    components = dict(plan.components)
    components["latent KV cache"] = (
        components["latent KV cache"]
        * min(prompt_tokens + new_tokens, plan.context)
        // plan.context
    )
    components["prefill scratch"] = (
        components["prefill scratch"] * min(prompt_tokens, plan.prefill_chunk) // plan.prefill_chunk
    )
    found = {name: {plan.tier: size} for name, size in components.items()}
    for name, size in plan.host.items():
        found.setdefault(name, {})["ram"] = size
    return found


def by_tier(components: dict[str, dict[str, int]]) -> dict[str, int]:
    """Tier -> bytes of all components."""
    total: dict[str, int] = {}
    for parts in components.values():
        for tier, size in parts.items():
            total[tier] = total.get(tier, 0) + size
    return total
