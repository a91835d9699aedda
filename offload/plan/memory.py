"""What goes where, in bytes: pure arithmetic over a config's geometry, without torch.

Tiers: ``ram`` holds everything when there is no GPU; with one, ``vram`` holds resident weights,
KV cache, slots and scratch, and ``ram`` the process itself and a host tier of experts.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

from slotmoe.errors import PlanError
from slotmoe.model.config import Config
from slotmoe.model.names import EMBEDDING, part_of, resident_shapes, role_of
from slotmoe.network.shapes import CONVOLVED, MARKS, SPARE, Marks, latent_bytes
from slotmoe.offload.policy.passes import FEW_DRAFTED, MOST_DRAFTED
from slotmoe.quant import shapes
from slotmoe.quant.codecs.codec import DEFAULT_CODECS, EXPERT_CODECS, KEPT_CODECS, ExpertCodecs
from slotmoe.quant.shapes import FEW_ROWS, PART_ROWS, SPANS, SPLITS
from slotmoe.sizes import format_size

PREFILL_CHUNK = 512  # tokens of a prefill pass's step, for every budget: some logits depend on it
LENT = 4  # records at once that the CPU computes with in prefill, or waits for from the disk
CUBLAS_BYTES = 8 << 20  # its workspace, from torch's allocator; 32 MiB on compute capability 9.0
PAGED = 4096 // 8  # bytes of locked RAM to one of the GPU's page tables; no page is a large one
MARKED_TOKENS = 1024  # between two copies of the states of delta rules
DEFAULT_CONTEXT = 4096  # or the model's limit
HELP_BYTES = 128 << 10  # the waiting thread reads such a record: waking another costs more
# What importing the libraries takes, with torch 2.13 for CPUs; a running process knows its figure.
IMPORT_BYTES = 226 << 20
CUDA_IMPORT_BYTES = 1 << 30
# Of what is free, where no budget is given; of RAM below a GPU less, since that is page-locked.
FREE_SHARE, LOCKED_SHARE = 0.9, 0.75


def share_of(free: int, locked: bool = False) -> int:
    """Bytes that a model takes of so many ``free`` ones of RAM, or of a GPU, by itself."""
    return int(free * (LOCKED_SHARE if locked else FREE_SHARE))


@dataclass(frozen=True)
class _Kept:
    """Rows that some layers keep: one of every ``ratio`` tokens for good, in ``row`` bytes, or none
    for 0; and of the last ``most`` tokens, ``regular`` of them at a mark that is no text's end,
    ``last`` bytes a token; or ``held`` states of all tokens together, each of which a token reads
    or writes.  It reads ``topk`` rows at most, all for 0."""

    ratio: int
    row: int
    most: int
    regular: int
    last: int
    topk: int = 0
    held: int = 0

    def nbytes(self, positions: int, marks: Marks) -> int:
        rows = self.row * max(1, positions // self.ratio) if self.ratio else 0
        marked = marks.ends * self.most + marks.most * self.regular
        return rows + self.last * ((self.held or 2 * (self.most + 1 + SPARE)) + marked)

    def read_bytes(self, length: int) -> int:
        if not self.ratio:
            return self.last * (self.held or min(length, self.most))
        rows = length // self.ratio
        return self.row * min(rows, self.topk or rows) + self.last * (self.most + 1) // self.ratio


def _kept(config: Config, kernels: str) -> Iterator[_Kept]:
    """What a model keeps: latents and index keys; or keys and values of groups, of all tokens or of
    a window, and what goes into delta rules, and their states; or where attention compresses, the
    window, and compressed rows by their ratio, twice where they have keys for an indexer.
    ``native`` kernels keep 8 bits a value, with 16 bytes of scales and sums a row, the
    ``reference`` path 4 bytes, others 2."""

    def row(latent: int, rope: int) -> int:
        if kernels == "native":
            return latent_bytes(latent, rope)
        return (latent + rope) * (4 if kernels == "reference" else 2)

    c, indexer = config.compressed, config.indexer
    layers = [(config.ratio(at), config.has_indexer(at)) for at in range(config.layer_count)]
    topk, windows = 0 if indexer is None else indexer.topk, config.windows
    if (d := config.delta) is not None:
        rules = windows.count(-1) * 4
        yield _Kept(0, 0, CONVOLVED - 1, CONVOLVED - 1, rules * d.columns)
        yield _Kept(0, 0, 1, 1, rules * d.state_values, held=2)
    if (a := config.grouped) is not None:
        own = a.groups * row(a.head_dim, a.head_dim)
        full = len(layers) - len(windows) + windows.count(0)  # with that of the mtp head
        yield _Kept(1, full * own, 0, 0, 0)
        if (most := max(windows) - 1) >= 0:
            yield _Kept(0, 0, most, most, (len(layers) - full) * own)
        return
    if c is None:
        latent = row(config.kv_lora_rank, config.qk_rope_head_dim)
        yield _Kept(1, (len(layers) - windows.count(-1)) * latent, 0, 0, 0, topk)
        if indexer is not None:
            yield _Kept(1, layers.count((0, True)) * row(indexer.head_dim, 0), 0, 0, 0)
        return
    assert indexer is not None
    most = c.sliding_window - 1
    yield _Kept(0, 0, most, most, len(layers) * row(c.head_dim, 0))
    for ratio, overlaps in sorted({*layers} - {(0, False)}):
        count, span = layers.count((ratio, overlaps)), (1 + overlaps) * ratio
        sizes = [(c.head_dim, topk * overlaps), *[(indexer.head_dim, 0)] * overlaps]
        for values, most_read in sizes:
            last = count * 2 * (1 + overlaps) * values * 4
            yield _Kept(ratio, count * row(values, 0), span - 1, overlaps * ratio, last, most_read)


def kv_bytes(config: Config, positions: int, kernels: str, marks: Marks = MARKS) -> int:
    """Bytes of the KV cache for so many positions: ``kv_lora_rank + qk_rope_head_dim`` values a
    layer each, and ``index_head_dim`` in layers with an indexer; with grouped queries a value and a
    key of each group, and windows, or states of delta rules, with all possible marks.  Where
    attention compresses: a window, compressed rows, uncompressed tokens in float32, and marks."""
    return sum(kept.nbytes(positions, marks) for kept in _kept(config, kernels))


def kv_read_bytes(config: Config, length: int, kernels: str) -> int:
    """Bytes of it that a token behind so many reads: all index keys, and the rows chosen."""
    return sum(kept.read_bytes(length) for kept in _kept(config, kernels))


def mark_bytes(config: Config, tokens: int, kernels: str) -> int:
    """Bytes of the marks that a pass over so many tokens makes."""
    spacing = MARKS.tokens if config.delta is None else MARKED_TOKENS
    return tokens // spacing * sum(kept.regular * kept.last for kept in _kept(config, kernels))


def choose_marks(config: Config, budget: int, sequences: int) -> Marks:
    """Where sequences can be cut.  With delta rules a mark is a copy of the states of all: as many
    as a 32nd of the budget holds, 4 to 8, the last half of them of texts' ends."""
    if config.delta is None:
        return MARKS
    kept = [kept for kept in _kept(config, "native") if not kept.ratio]
    size, rest = sum(one.regular * one.last for one in kept), Marks(most=0, ends=0)
    most = min(8, max(4, budget // 32 // sequences // size))
    constant = sum(one.nbytes(0, rest) for one in kept)
    return Marks(MARKED_TOKENS, most, most // 2, 1, size, constant)


def choose_context(config: Config, wanted: int | None) -> int:
    """Positions: as wanted, else min(``DEFAULT_CONTEXT``, the model's).  Raises ``PlanError``."""
    limit = config.max_position_embeddings
    context = min(DEFAULT_CONTEXT, limit) if wanted is None else wanted
    if not 1 <= context <= limit:
        allowed = f"1 to {limit}, the model's max_position_embeddings"
        raise PlanError(f"context {context} is outside {allowed}")
    return context


def or_more_context(advice: str, config: Config, context: int) -> str:
    """``advice``, and to raise --context where the model has more positions than ``context``."""
    limit = config.max_position_embeddings
    if context < limit:
        return f"{advice}, or raise --context (now {context}, the model has {limit})"
    return f"{advice}; {limit} positions are all that the model has"


@dataclass(frozen=True)
class Sizes:
    """Bytes: ``resident`` weights by component, those one token ``touched``, an expert's record."""

    resident: dict[str, int]
    touched: int
    record_bytes: int


def default_codecs(config: Config) -> ExpertCodecs:
    """How experts are coded unless said: as the checkpoint has them, if a codec holds that."""
    encoding = config.encoding
    name = "" if encoding is None else (encoding.of_experts or encoding).name
    return KEPT_CODECS.get(name) or EXPERT_CODECS.get((name, "4"), DEFAULT_CODECS)


@lru_cache(maxsize=64)  # a report asks for the same ones dozens of times
def sizes_of(config: Config, resident: str, codecs: ExpertCodecs) -> Sizes:
    """Sizes of an export with ``resident`` of ``RESIDENT_MODES``, or a ``FITTED_MODE``."""
    components, touched = Counter[str](), 0
    for name, shape in resident_shapes(config).items():
        size = shapes.resident_bytes(role_of(name), shape, resident, name)
        components[part_of(name).component] += size
        if config.tie_word_embeddings or name != EMBEDDING:
            touched += size
    sizes = config.hidden_size, config.moe_intermediate_size
    record = shapes.record_bytes(*sizes, codecs, config.family.expert_biases)
    return Sizes(dict(components), touched, shapes.padded(record))


def export_bytes(config: Config, sizes: Sizes) -> int:
    """Bytes of the export on disk."""
    experts = len(config.moe_layers) * config.n_routed_experts
    return experts * sizes.record_bytes + sum(sizes.resident.values())


def runtime_growth(config: Config, resident: int) -> int:
    """Bytes that the process takes beside its parts once it has run: pages of libraries and thread
    stacks, the manifest's records, and what is lost at the ends of large pages that hold
    ``resident`` bytes of weights.  Fitted to measured peaks."""
    return (16 << 20) + 2048 * len(config.moe_layers) * config.n_routed_experts + resident // 50


def scratch_bytes(config: Config, tokens: int, kernels: str, value_bytes: int = 4) -> int:
    """Bytes of a prefill step's temporaries at most; up to a quarter too many at real geometries.

    With ``native`` kernels: queries before and after absorption and the attention's output, then
    the outputs of every expert that a token uses; freed blocks of one kind rarely serve the other.
    With ``torch``: one block of scores with its expanded keys and values, and a dequantized slice
    of weights.  For ``triton`` see ``_gpu_scratch``, for ``vulkan`` ``_vulkan_scratch``.
    """
    c, T, D, H = config, tokens, config.hidden_size, config.num_attention_heads
    if kernels == "vulkan":
        return _vulkan_scratch(config, tokens)
    if kernels == "native":
        query = H * (c.qk_nope_head_dim + c.qk_rope_head_dim) + (H + 1) * c.qk_rope_head_dim
        attention = (2 + c.mtp) * D + query + H * (3 * c.kv_lora_rank + c.qk_rope_head_dim)
        attention += _more_scratch(c)
        return (2 << 20) + 4 * T * (attention + D * (c.num_experts_per_tok + 4))
    if kernels != "torch":
        return _gpu_scratch(config, tokens)
    query = T * H * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    widest = max(c.intermediate_size, max(c.n_shared_experts, 1) * c.moe_intermediate_size)
    scores = 4 * max(1 << 22, T * H * 64)
    weights = 4 * D * c.moe_intermediate_size + 3 * (1 << 22)
    rows = 3 * query + T * D * (c.num_experts_per_tok + 6) + 3 * T * widest
    rows += T * _more_scratch(c)
    return value_bytes * (rows + scores + weights)


def _vulkan_scratch(c: Config, T: int) -> int:
    """What decoder.cpp allocates for a step's rows, and for what its shaders are told."""
    D, H, K, R = c.hidden_size, c.num_attention_heads, c.num_experts_per_tok, c.kv_lora_rank
    few, moe, P, uses = FEW_ROWS, len(c.moe_layers), c.qk_rope_head_dim, K * c.moe_intermediate_size
    widest = max(c.intermediate_size, c.n_shared_experts * c.moe_intermediate_size)
    groups, cached = (c.grouped.groups, 2 * R) if c.grouped else (1, R + P)
    row = 4 * D + (c.q_lora_rank or 0) + H * (c.qk_nope_head_dim + P + c.v_head_dim)
    row += groups * cached + max(H * cached, K * D) + c.n_routed_experts + max(widest, uses) + 2 * K
    sums = H * (R + 2) * max(few * min(max(1024 // H, 16), 64), T)
    told = 17 * (T * K // 16 + c.n_routed_experts) + 2 * moe * c.n_routed_experts + T * (10 + P)
    few *= (moe - 1) * D + c.vocab_size + uses
    return 4 * (T * row + sums + told + few + 1000 * c.num_hidden_layers)


def _more_scratch(c: Config) -> int:
    """Values of 32 bits that a token has in attention with an indexer: its queries and key before
    and after rotation, and lists of rows; what compressors project, and what goes into delta rules;
    and of several residual streams beside one: themselves, and three copies where they are mixed.
    """
    values = 0 if c.hyper is None else 4 * c.stream_width - c.hidden_size
    if c.delta is not None:  # beyond what other layers take
        own = 3 * c.delta.columns + 4 * c.delta.num_value_heads * c.delta.value_head_dim
        values += max(0, own - c.num_attention_heads * 4 * c.kv_lora_rank)
    if c.indexer is not None:
        values += 3 * c.indexer.topk + 3 * (c.indexer.n_heads + 1) * c.indexer.head_dim
        if c.compressed is not None:
            values += 8 * (c.compressed.head_dim + c.indexer.head_dim)
            values += 3 * c.compressed.sliding_window
    return values


def _gpu_scratch(c: Config, T: int) -> int:
    """The same with Triton's kernels, where a pass has all its temporaries from one allocator,
    which gives what was freed to whoever asks next: the largest of its parts, and what lasts.

    Attention: the residual stream, its norm and their kind, the queries, and in the latents' space
    again, with and without the rotated parts that are put beside them; the fewer tokens there are,
    the more parts of sums.  Experts: outputs by use, and what is between projections; a wide MLP in
    bfloat16 has its gate and up, and one of them rounded.
    """
    D, H, K, R = c.hidden_size, c.num_attention_heads, c.num_experts_per_tok, c.kv_lora_rank
    head, P = c.qk_nope_head_dim + c.qk_rope_head_dim, c.qk_rope_head_dim
    query = H * (head + 2 * R + P) + (H + 1) * P
    attention = 4 * (4 * D + query + 2 * (R + P) + (c.q_lora_rank or 0))
    widest = max(c.intermediate_size, c.n_shared_experts * c.moe_intermediate_size)
    lasting = 4 * T * _more_scratch(c)
    splits = 4 * H * SPLITS * (R + 2)  # partial sums of one token's attention
    parts = (
        T * attention,
        min(T, PART_ROWS // (2 * H)) * attention + 4 * PART_ROWS * (R + 2),
        T * (16 * D + 10 * widest),
        T * (12 * D + K * (4 * D + 2 * c.moe_intermediate_size)),
    )
    # What a decoder's rows have lasts: sums, queries, outputs of experts.
    decoded = (FEW_ROWS if c.indexer is None else 1) * (splits + 4 * (2 * H * (R + head) + K * D))
    return max(parts) + lasting + decoded + CUBLAS_BYTES


def waiting_bytes(config: Config, tokens: int) -> int:
    """What a prefill pass holds of its steps that are not at work: residual streams, twice for the
    head that predicts one token more, and rotations, float32; and the marks that it makes."""
    rotations = config.qk_rope_head_dim * (1 if config.compressed is None else 2)
    width = (1 + config.mtp) * config.stream_width + rotations
    waiting = max(0, tokens - PREFILL_CHUNK)
    return 4 * waiting * width + mark_bytes(config, waiting, "torch")


def _prefill_chunk(config: Config, context: int, room: int) -> int:
    """Tokens of a prefill pass.  Each pass brings every expert that it needs once, so a longer one
    reads less; what it holds may take a twentieth of the ``room`` that experts would get."""
    best = PREFILL_CHUNK
    while best < min(context, 4096) and waiting_bytes(config, 2 * best) <= room // 20:
        best *= 2
    return best


@dataclass(frozen=True)
class Plan:
    """The memory of one run.  ``components`` maps name to bytes on the fast tier ``tier``:
    ``slots`` experts stay there and ``staging`` more are on their way in or being used once.  With
    a GPU, ``host`` is the same for RAM, where ``host_slots`` experts stay and ``host_staging`` more
    are on their way or lent to the CPU.  A prefill pass takes ``prefill_chunk`` tokens, in steps of
    ``PREFILL_CHUNK``, and one of decode at most ``drafted`` beside those that are certain."""

    components: dict[str, int]
    slots: int
    staging: int
    record_bytes: int
    budget: int
    tier: str
    context: int
    prefill_chunk: int = PREFILL_CHUNK
    drafted: int = 0
    host: dict[str, int] = field(default_factory=dict)
    host_slots: int = 0
    host_staging: int = 0
    host_budget: int = 0
    marks: Marks = MARKS

    @property
    def tiers(self) -> dict[str, tuple[int, dict[str, int]]]:
        """Tier -> its budget and its components."""
        below = {"ram": (self.host_budget, self.host)} if self.host else {}
        return {self.tier: (self.budget, self.components)} | below

    @property
    def total(self) -> int:
        return sum(self.components.values())

    @property
    def shortfall(self) -> dict[str, int]:
        """What the fewest slots need beyond the budget, by tier; empty if the plan works."""
        missing = {tier: sum(parts.values()) - most for tier, (most, parts) in self.tiers.items()}
        return {tier: size for tier, size in missing.items() if size > 0}

    def check(self) -> None:
        """Raises ``PlanError`` if not even one token's experts fit."""
        for tier, missing in self.shortfall.items():
            budget, components = self.tiers[tier]
            fast = tier == self.tier
            advice = ", lower --context, or quantize with --resident mixed" if fast else ""
            parts = [f"{name} {format_size(size)}" for name, size in components.items() if size]
            needs = f"needs at least {format_size(budget + missing)} of {tier} ({', '.join(parts)})"
            short = f"the budget is {format_size(budget)}, {format_size(missing)} short"
            raise PlanError(f"{needs}, {short}: raise --{tier}{advice}")


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
    drafts: bool = False,
    unified: bool = False,
) -> Plan:
    """Spend ``budget`` bytes of ``tier`` on what is resident, read buffers, and as many expert
    slots as remain, or exactly ``slots`` of them; and ``host_budget`` bytes of RAM below a GPU
    likewise.  ``runtime_bytes`` is what the process holds before a model is opened; ``logits_rows``
    rows of logits are in memory at once, and the latents of ``sequences`` sequences of ``context``
    positions; with ``drafts``, also more rows of a pass of decode.  Where memory is ``unified``,
    the GPU's is that RAM, and experts stay where they are read to.  A plan that doesn't fit has a
    ``shortfall``; raises ``PlanError`` for slots that can't serve one token."""
    everything, top_k = len(config.moe_layers) * config.n_routed_experts, config.num_experts_per_tok
    record, on_cpu, vulkan = sizes.record_bytes, tier == "ram", kernels == "vulkan"
    marks = choose_marks(config, budget, sequences)
    runtime = runtime_bytes + runtime_growth(config, sum(sizes.resident.values()))
    table = shapes.LEVELS_BYTES + (0 if vulkan else 4 * (everything + config.n_routed_experts))
    components = {
        **sizes.resident,
        "KV cache": sequences * kv_bytes(config, context, kernels, marks),
        "logits": 4 * logits_rows * config.vocab_size * (not vulkan),
        **({"runtime": runtime} if on_cpu else {"slot table": table}),
    }
    scratch = scratch_bytes(config, PREFILL_CHUNK, kernels, 4 if on_cpu else 6)
    in_ram = min(max(0, (host_budget or 0) - runtime) // record, everything)
    locked = 0 if host_budget is None else (in_ram + 5 * max(top_k, LENT)) * record
    room = budget - sum(components.values()) - scratch - locked // PAGED
    is_scarce = min(room // record, slots or everything) < everything
    drafted, sums = _drafted(config, kernels, is_scarce) if drafts else (0, 0)
    room, chunk = room - sums, PREFILL_CHUNK
    # A pass in steps keeps a layer's experts, and reads the next one's.
    if 2 * config.n_routed_experts <= min(room // record, slots or everything) < everything:
        chunk = _prefill_chunk(config, context, room)
    waiting = 0 if vulkan else waiting_bytes(config, chunk)
    count, staging = _divide((room - waiting) // record, slots, everything, top_k)
    if count < (least := min(slots or top_k, everything)) or (unified and slots is None):
        count, staging = least, top_k
    components |= {
        "prefill scratch": scratch + sums,
        "waiting tokens": waiting,
        "expert slots": count * record,
        "read buffers": min(staging, everything - count) * record,
    }
    given = components, count, staging, record, budget, tier, context, chunk, drafted
    plan = Plan(*given, marks=marks)
    top_k *= FEW_ROWS if vulkan else 1  # which may all be read in RAM
    below = (host_budget or 0) - plan.total * unified
    return plan if host_budget is None else _above(plan, runtime, below, everything, top_k)


def _drafted(config: Config, kernels: str, is_scarce: bool) -> tuple[int, int]:
    """Rows that a pass of decode may have beside its certain ones, and bytes of their sums."""
    if kernels == "native":
        count = FEW_DRAFTED if is_scarce else MOST_DRAFTED
        return count, count * 4 * SPANS * config.num_attention_heads * config.kv_lora_rank
    return (FEW_ROWS - 1) * (kernels != "torch" and config.indexer is None), 0


def _above(plan: Plan, runtime: int, budget: int, everything: int, top_k: int) -> Plan:
    """The plan of a GPU with what so much RAM below it holds."""
    lent, record = plan.staging + max(top_k, LENT), plan.record_bytes
    room = (budget - runtime) // record - lent if plan.slots < everything else 0
    kept = max(0, min(room, everything))
    host = {"runtime": runtime, "expert slots": kept * record, "read buffers": lent * record}
    components = plan.components | {"page tables": (kept + lent) * record // PAGED}
    plan = replace(plan, components=components, host=host, host_budget=budget)
    return replace(plan, host_slots=kept, host_staging=lent)


def _divide(room: int, slots: int | None, everything: int, top_k: int) -> tuple[int, int]:
    """How many of ``room`` records are slots, at most ``slots``, and how many are read buffers.

    A layer's demand needs ``top_k`` buffers; up to three times as many more, within an eighth of
    the room, hold what is read ahead.  If everything fits, buffers take no memory of their own.
    Raises ``PlanError`` for fewer slots than a token needs."""
    if slots is not None and slots < top_k:
        reason = f"one token uses {top_k} experts of a layer at once, give at least {top_k}"
        raise PlanError(f"{slots} expert slots are too few: {reason}")
    wanted = everything if slots is None else min(slots, everything)
    if room >= everything and wanted == everything:
        return everything, 4 * top_k
    staging = min(4 * top_k, max(top_k, room // 8 if wanted == everything else room - wanted))
    return min(wanted, room - staging), staging
