"""How fast a plan can run: bytes over bandwidth, and what was measured of the rest.  Without torch.

Bandwidths and the speed of a core are the machine's own (``slotmoe bench --calibrate`` stores
them), given by the user, or assumed, and the report says which.  The other constants here are
measurements of this project, named beside them and in the report.

They also say who computes an expert in no slot beside a GPU: the GPU, once it is copied, or the
CPU.  Both go on at once, so the best split is the one whose slower side is done first.
"""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json, read_json, typed
from slotmoe.model.config import Config
from slotmoe.model.names import resident_shapes
from slotmoe.offload.machine import read_note, write_note
from slotmoe.offload.plan.memory import HELP_BYTES, PREFILL_CHUNK, Plan, Sizes, kv_read_bytes

# What prefill does beside products (norms, gates, sums), as int8 products for each value of a token
# in a layer: the sample, V2-Lite and GLM-4.7-Flash on a Zen 5 core.
STREAM_PRODUCTS = 8000
DECODED_ROWS = 1  # in prefill decoding an expert's codes costs as much as so many tokens by it
GPU_SHARE = 0.6  # of a GPU's bandwidth that decode reaches: assumed, not measured
GPU_PRODUCTS_SHARE = 0.3  # of what its tensor cores give that prefill reaches: assumed
HEAD_RIGHT = 0.85  # of what a model's own head drafts: DeepSeek-V3's report, not measured
# Kernels of a token in a layer by its attention: latents have one graph, of one more with q-LoRA;
# the others are launched one by one from Python, and so is all of prefill.
GPU_LAUNCHES = {"latent": 8, "indexed": 60, "compressed": 78, "grouped": 54}
VULKAN_LAUNCHES, BARRIER_SECONDS = 9, 5e-6  # of a layer, one more with q-LoRA; from one to the next
PREFILL_LAUNCHES = 40
GPU_LAUNCH_SECONDS, PYTHON_LAUNCH_SECONDS = 1.5e-6, 8e-6  # each of them: assumed
GPU_MISS_SECONDS = 5e-5  # from a layer's choice to its first copy, 0.02 ms of it for the driver
# All that the host does in a layer with misses, most of it while records are copied, and until the
# CPU's first product: 160 experts a layer beside a driver that does nothing, a core of Sapphire
# Rapids of which others took half; the least of many runs.
HOST_SECONDS = {"fetch": 4.8e-4, "cpu": 4.4e-4, "hybrid": 6.4e-4}
CPU_START_SECONDS = {"cpu": 1e-4, "hybrid": 1.5e-4}
SAMPLE_SECONDS = 8e-10  # a logit: 0.1 ms for 129,280 with temperature and top-p, one core
VULKAN_HOST_SECONDS = 1.5e-4  # of a token, with what goes on to slots; measured on a simulated card
TOKEN_SECONDS = 5e-4  # Python and torch of a token: 0.4 ms with the sample, 1.2 with V2-Lite
LAYER_SECONDS = 2e-4  # the same of a layer with a call of its own
MISS_SECONDS = 1.7e-4  # Python, a colder read and a kernel call for an expert read by the decoder
# Hits of the default policy against the share of experts in slots: the sample, held-out texts.
TEXT_HITS = ((0.0, 0.0), (0.1, 0.31), (0.25, 0.56), (0.5, 0.8), (1.0, 1.0))
# Values in and out by products of the shapes that rates are measured with, V2-Lite's and the
# sample's ("small"): a product of matrices takes a time for each product, and for each value.
SHAPES = {
    "int8": ((2048 + 4096) / (2048 * 4096), (256 + 704) / (256 * 704)),
    "coded": ((2048 + 1408) / (2048 * 1408), (256 + 64) / (256 * 64)),
    "attention": (1 / (2 * 512 + 64), 1 / (2 * 64 + 16)),
}
MODES = ("auto", "fetch", "cpu", "hybrid")  # who computes an expert in no slot, see ``Split``
BOUND_TOKENS = 3  # up to so many, CPU kernels are bound by reading the record, not by arithmetic
CORE = (*(f"{kind}_{size}" for kind in SHAPES for size in ("products", "small")), "core_bytes")
_Rate = Annotated[float, Meta(ge=1e-12, le=10**15)]
MEASURED = ("ram", "share", "disk", "latency", "gpu", "pcie", "pcie_busy", "experts", *CORE)
OF_GPU = ("gpu", "pcie", "pcie_busy", "experts")  # those that are of one GPU, and of its link
# Products and bytes beside AVX-512's by sets' first letters: Zen 5, Sapphire Rapids; NEON guessed.
SETS = {"avx2": (0.25, 0.7), "avxvnni": (0.55, 1.0), "neon": (0.25, 0.7), "portable": (0.02, 0.03)}
SETS["amx"] = 1.25, 0.99


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second of each tier, seconds of one small read, what a core gets through in a second,
    and where the figures come from: ``assumed``, ``given`` or ``measured on DATE``."""

    ram: float = 40e9
    share: float = 0.95  # of it that decode's kernels reach
    disk: float = 2e9
    gpu: float = 500e9
    gpu_products: float = 35e12  # multiply-adds of its tensor cores
    pcie: float = 25e9
    pcie_busy: float = 20e9  # the same while the CPU computes experts
    experts: float = 0.0  # records that the CPU's kernels get through meanwhile; 0: see beside_gpu
    latency: float = 1e-4  # seconds of one small read from the disk
    # Of a core: multiply-adds of many tokens by int8 weights, by coded ones, and in attention, each
    # in two sizes (``SHAPES``); and bytes of weights for one token.
    int8_products: float = 110e9
    int8_small: float = 80e9
    coded_products: float = 110e9
    coded_small: float = 40e9
    attention_products: float = 90e9
    attention_small: float = 36e9
    core_bytes: float = 25e9
    origin: dict[str, str] = field(default_factory=dict)

    def updated(self, origin: str, **values: float) -> "Bandwidths":
        """With these ``values`` instead."""
        return replace(self, **values, origin=self.origin | dict.fromkeys(values, origin))

    def origin_of(self, name: str) -> str:
        """Where the figure of tier ``name`` comes from."""
        return self.origin.get(name, "assumed")

    def assumed_for(self, isa: str) -> "Bandwidths":
        """What was not measured of a core as it is assumed for kernels of that instruction set."""
        factors = next((SETS[name] for name in SETS if isa.startswith(name)), (1.0, 1.0))
        names = [name for name in CORE if name not in self.origin]
        values = {name: getattr(self, name) * factors[name == "core_bytes"] for name in names}
        return self.updated(f"assumed for {isa}", **values)

    def beside_gpu(self) -> float:
        """``experts``, or if unmeasured what copies leave of the RAM's bandwidth, at least half."""
        ram = self.share * self.ram
        return self.experts or max(ram - self.pcie_busy, ram / 2)

    def core_seconds(self, kind: str, products: float, values: float) -> float:
        """Seconds of a core for ``products`` of a kind of ``SHAPES``, which take ``values`` in and
        out; for attention those are scores."""
        large, small = (1 / getattr(self, f"{kind}_{size}") for size in ("products", "small"))
        few, many = SHAPES[kind]
        a_value = min(max(0.0, (small - large) / (many - few)), large / few)
        return float(products * (large - a_value * few) + values * a_value)


def gpu_launches(config: Config, vulkan: bool) -> tuple[int, float]:
    """Kernels of a token in a layer on a GPU, and seconds of each beside its work."""
    kind = config.family.attention
    if vulkan:
        return VULKAN_LAUNCHES + (config.q_lora_rank is not None), BARRIER_SECONDS
    if kind == "latent" and config.indexer is None and config.delta is None:
        return GPU_LAUNCHES[kind] + (config.q_lora_rank is not None), GPU_LAUNCH_SECONDS
    return GPU_LAUNCHES["indexed" if kind == "latent" else kind], PYTHON_LAUNCH_SECONDS


def constants(rates: Bandwidths, gpu: bool, config: Config, vulkan: bool) -> dict[str, float]:
    """What a prediction takes for granted, by its name in the report."""
    launches, seconds = gpu_launches(config, vulkan)
    of_cpu = {
        "products for a value of prefill's stream": STREAM_PRODUCTS,
        "tokens for an expert's decoding": DECODED_ROWS,
        "seconds of Python a token": TOKEN_SECONDS,
        "a layer by itself": LAYER_SECONDS,
        "a small read": MISS_SECONDS,
    }
    of_gpu = {
        "share of GPU memory's bandwidth": GPU_SHARE,
        "multiply-adds of its tensor cores": rates.gpu_products,
        "share of these": GPU_PRODUCTS_SHARE,
        "kernels a layer": launches,
        "seconds between two": seconds,
        "a layer that waits": GPU_MISS_SECONDS,
        "the host's work for that": HOST_SECONDS["fetch"],
        "on Vulkan instead, for a token": VULKAN_HOST_SECONDS,
        "sampling a logit": SAMPLE_SECONDS,
    }
    of_head = {"the head's drafts that are right": HEAD_RIGHT} if config.mtp else {}
    return {"share of RAM's bandwidth": rates.share} | (of_gpu if gpu else of_cpu) | of_head


def stored_bandwidths(path: Path, gpu: str | None = None) -> Bandwidths:
    """What ``store_bandwidths`` wrote to ``path``, of a GPU only what was measured of that one, or
    assumptions.  Raises ``ConfigError``."""
    if not path.is_file():
        return Bandwidths()
    stored = read_json(path, 1 << 16, Json)
    try:
        names = [name for name in MEASURED if name not in OF_GPU or stored.get("device") == gpu]
        measured = {name: stored[name] for name in names if stored.get(name) is not None}
        values = typed(measured, dict[str, _Rate])
    except ValueError as problem:
        advice = "delete it or run slotmoe bench --calibrate again"
        raise ConfigError(f"{path}: {problem}; {advice}") from None
    return Bandwidths().updated(f"measured on {str(stored.get('date'))[:10]}", **values)


def store_bandwidths(path: Path, gpu: str | None = None, **values: float) -> None:
    """Store measured figures, named as in ``MEASURED``, beside those that are there, whose date
    stays, but for those of another ``gpu``.  Raises ``OSError``."""
    assert set(values) <= set(MEASURED)
    path.parent.mkdir(parents=True, exist_ok=True)
    note = {"date": date.today().isoformat(), **read_note(path)}
    if gpu is not None and note.get("device") != gpu:
        note = {name: note[name] for name in note if name not in OF_GPU} | {"device": gpu}
    write_note(path, note | values)


@dataclass(frozen=True)
class Speed:
    """A predicted speed (of prefill None where nothing modelled bounds it), the assumed hit rate,
    what a prompt and a token wait for, ``bottleneck`` longest.  Commands give it as JSON so."""

    prefill_tokens_per_second: float | None
    prefill_seconds: dict[str, float]
    decode_tokens_per_second: float
    hit_rate: float
    decode_seconds: dict[str, float]
    bottleneck: str


@dataclass(frozen=True)
class Setting:
    """A plan, the machine it runs on, and the routing to expect.  ``random_routing``: a token may
    use any expert, as with the weights of ``slotmoe synth``; else it uses experts as text does.
    ``misses`` says how a GPU's missing experts are computed (``Split``), or ``read``: by Vulkan,
    which reads them in RAM; without a link that is its memory too."""

    config: Config
    sizes: Sizes
    plan: Plan
    bandwidths: Bandwidths
    threads: int
    random_routing: bool
    misses: str = "fetch"
    prefetch: bool = True
    known: float | None = None  # the plan's hit rate

    def hits(self, slots: int) -> float:
        """Hit rate to expect of so many slots: on text ``TEXT_HITS``, interpolated."""
        if self.known is not None and slots <= self.plan.slots:
            return self.known
        share = slots / (len(self.config.moe_layers) * self.config.n_routed_experts)
        if self.random_routing:
            return share
        after = min(max(1, bisect_left(TEXT_HITS, (share, 0.0))), len(TEXT_HITS) - 1)
        (x0, y0), (x1, y1) = TEXT_HITS[after - 1], TEXT_HITS[after]
        return y0 + (y1 - y0) * (min(share, 1.0) - x0) / (x1 - x0)

    def predict(self, prompt_tokens: int, new_tokens: int) -> Speed:
        """Speed for a prompt and its continuation, with the slots full: a cold start is slower."""
        depth = prompt_tokens + new_tokens // 2
        without = replace(self, config=replace(self.config, mtp=False))
        seconds = without._decode_seconds(depth, 1)
        if self.config.mtp:  # the engine drafts where that pays
            both = self._decode_seconds(depth, 2)
            drafting = {name: spent / (1 + HEAD_RIGHT) for name, spent in both.items()}
            seconds = min(seconds, drafting, key=self.total)
        prefill = self._prefill_seconds(prompt_tokens)
        spent, slowest = self.total(prefill), max(seconds, key=seconds.__getitem__)
        speeds = prompt_tokens / spent if spent else None, prefill, 1 / self.total(seconds)
        return Speed(*speeds, self.hits(self.plan.slots), seconds, slowest)

    def total(self, seconds: dict[str, float]) -> float:
        """Reads hide behind computing, but not perfectly; the computing thread makes small ones."""
        disk = seconds["disk"]
        computing = sum(seconds.values()) - disk
        ahead = self.prefetch and self.sizes.record_bytes > HELP_BYTES
        return math.hypot(computing, disk) if ahead else computing + disk

    def _attention(self, depth: int) -> float:
        """Seconds of a core for a token behind so many."""
        products = attention_products(self.config, depth)
        scores = products / row_products(self.config)
        return self.bandwidths.core_seconds("attention", products, scores)

    def _decode_seconds(self, depth: int, rows: int) -> dict[str, float]:
        """What a pass over so many ``rows`` of a text waits for."""
        c, rates, record = self.config, self.bandwidths, self.sizes.record_bytes
        on_cpu, small, K = self.plan.tier == "ram", record <= HELP_BYTES, c.num_experts_per_tok
        used = len(c.moe_layers) * c.n_routed_experts * (1 - (1 - K / c.n_routed_experts) ** rows)
        latents = kv_read_bytes(c, depth, "native" if on_cpu else "triton")
        touched = self.sizes.touched + latents + used * record
        missing = used * (1 - self.hits(max(self.plan.slots, self.plan.host_slots)))
        read_seconds = rates.latency + MISS_SECONDS if small else record / rates.disk
        disk = {"disk": missing * read_seconds}
        if not on_cpu:
            return disk | self._gpu_seconds(used, touched)
        between = c.num_hidden_layers * LAYER_SECONDS
        if missing == 0 or small:
            # Nothing is read ahead, so only a miss comes between two layers.
            alone = len(c.moe_layers) * (1 - (1 - missing / used) ** K)
            between = TOKEN_SECONDS + alone * LAYER_SECONDS
        return disk | {
            "between kernels": between,
            # The cores may be too few to keep the RAM busy.
            "RAM": touched / min(rates.share * rates.ram, self.threads * rates.core_bytes),
            "attention": rows * self._attention(depth) / self.threads,
        }

    def _gpu_seconds(self, used: float, touched: float) -> dict[str, float]:
        """What a pass waits for beside the disk on a GPU, which uses so many experts and touches so
        many bytes: all its kernels, and where experts of a layer are in no slot, their way or the
        CPU, and what the host does longer than those take."""
        c, rates, record = self.config, self.bandwidths, self.sizes.record_bytes
        vulkan = self.misses == "read"
        layers, (launches, seconds) = len(c.moe_layers), gpu_launches(c, vulkan)
        hits = self.hits(self.plan.slots) if rates.pcie else 1.0
        between = c.num_hidden_layers * launches * seconds + c.vocab_size * SAMPLE_SECONDS
        between += VULKAN_HOST_SECONDS * vulkan
        each, behind = round(used / layers), 0.0
        for missing in range(1, each + 1) if rates.pcie else ():
            share = math.comb(each, missing) * (1 - hits) ** missing * hits ** (each - missing)
            waits = self._missing_seconds(missing)
            behind += layers * share * waits
            host = GPU_MISS_SECONDS + max(0.0, HOST_SECONDS.get(self.misses, 0.0) - waits)
            between += layers * share * host * (not vulkan)
        # Meanwhile the GPU computes experts in slots and shared ones.
        beside = (used * hits + layers * c.n_shared_experts) * record
        computing = touched - min(beside, behind * rates.gpu * GPU_SHARE)
        waited = {"cpu": "CPU experts", "hybrid": "PCIe and CPU experts"}
        seconds_of = {"between kernels": between, "GPU memory": computing / rates.gpu / GPU_SHARE}
        return seconds_of | {waited.get(self.misses, "PCIe"): behind}

    def _missing_seconds(self, missing: int) -> float:
        """Of a token's layer with so many experts in no slot: the slower of what is copied and what
        the CPU computes; both read RAM, which gives no more than it has."""
        rates, record = self.bandwidths, self.sizes.record_bytes
        each = [1] * missing
        computed = 0 if self.misses in ("fetch", "read") else self.split.for_cpu(1, each, missing)
        link = rates.pcie_busy if computed else rates.pcie
        experts = min(rates.beside_gpu(), self.threads * rates.core_bytes)
        on_cpu = CPU_START_SECONDS[self.misses] + computed * record / experts if computed else 0.0
        read = missing * record / rates.share / rates.ram
        return max((missing - computed) * record / link, on_cpu, read)

    @property
    def split(self) -> "Split":
        """How missing experts are divided."""
        return Split(self.misses, self.bandwidths.pcie_busy / self.bandwidths.beside_gpu())

    def with_mode(self, wanted: str) -> "Setting":
        """With the way to compute what is missing that was ``wanted``, for ``auto`` with what is
        predicted to be fastest: both sides at once only where the CPU is twice as fast as the
        link, since their work has to be divided."""
        if wanted != "auto":
            return replace(self, misses=wanted)
        rates = self.bandwidths
        ways = ["fetch", "cpu"] + ["hybrid"] * (rates.beside_gpu() > 2 * rates.pcie_busy)
        settings = [replace(self, misses=way) for way in ways]
        return min(settings, key=lambda it: it.total(it._decode_seconds(PREFILL_CHUNK, 1)))

    def _prefill_seconds(self, tokens: int) -> dict[str, float]:
        """What a prompt waits for: each pass loads its experts once, and reads all weights for
        every step.  By Vulkan it is not known what bounds them."""
        c, rates, plan, record = self.config, self.bandwidths, self.plan, self.sizes.record_bytes
        experts, K = len(c.moe_layers) * c.n_routed_experts, c.num_experts_per_tok
        spent = defaultdict[str, float](float, disk=0.0)

        def used(tokens: int) -> float:  # bytes of experts
            return experts * (1 - (1 - K / c.n_routed_experts) ** tokens) * record

        for start in range(0, tokens * (self.misses != "read"), plan.prefill_chunk):
            chunk = min(tokens - start, plan.prefill_chunk)
            needed, step = used(chunk), min(chunk, PREFILL_CHUNK)
            spent["disk"] += needed * (1 - self.hits(max(plan.slots, plan.host_slots))) / rates.disk
            touched, steps = (self.sizes.touched + used(step)), chunk / step
            if plan.tier == "ram":
                each = self._token_seconds(used(step) / record / step)
                cores = chunk * (each + self._attention(start + chunk // 2)) / self.threads
                read = touched * steps / rates.ram / rates.share
                spent["RAM" if read > cores else "cores"] += max(cores, read)
                layers = TOKEN_SECONDS + c.layer_count * LAYER_SECONDS
            else:
                products = chunk * (self._products() + attention_products(c, start + chunk // 2))
                computed = products / rates.gpu_products / GPU_PRODUCTS_SHARE
                computed = max(computed, touched * steps / rates.gpu / GPU_SHARE)
                link = min(rates.pcie, rates.share * rates.ram)
                copied = needed * (1 - self.hits(plan.slots)) / link
                spent["PCIe" if copied > computed else "GPU"] += max(copied, computed)
                layers = c.layer_count * PREFILL_LAUNCHES * PYTHON_LAUNCH_SECONDS
            spent["between kernels"] += steps * layers
        return dict(spent)

    def _products(self) -> int:
        """Multiply-adds of a prompt's token; no attention, no head."""
        c = self.config
        shapes = [s for s in resident_shapes(c).values() if len(s) == 2 and c.vocab_size not in s]
        routed = len(c.moe_layers) * c.num_experts_per_tok * 3 * c.hidden_size
        return sum(map(math.prod, shapes)) + routed * c.moe_intermediate_size

    def _token_seconds(self, decoded: float) -> float:
        """A core's seconds for a prompt's token, ``decoded`` experts; no attention, no head."""
        c, rates = self.config, self.bandwidths
        D, inner = c.hidden_size, c.moe_intermediate_size
        uses = len(c.moe_layers) * c.num_experts_per_tok + DECODED_ROWS * decoded
        shapes = [s for s in resident_shapes(c).values() if len(s) == 2 and c.vocab_size not in s]
        dense = rates.core_seconds("int8", sum(map(math.prod, shapes)), sum(map(sum, shapes)))
        routed = rates.core_seconds("coded", uses * 3 * D * inner, uses * 3 * (D + inner))
        return dense + routed + STREAM_PRODUCTS * c.layer_count * D / rates.int8_products


def attention_products(config: Config, length: int) -> int:
    """Multiply-adds of scores and sums, of an indexer's scores, and of delta rules, for a token
    behind so many."""
    c, total, compresses = config, 0, config.compressed is not None
    window = 0 if c.compressed is None else min(length, c.compressed.sliding_window)
    for layer in range(c.num_hidden_layers):
        ratio = c.ratio(layer) if compresses else 1
        rows = min(length // ratio, c.window(layer) or length) if ratio else 0
        if c.delta is not None and c.has_delta(layer):  # read twice, written once, and faded
            total += 4 * c.delta.state_values
            continue
        if c.indexer is not None:
            if c.has_indexer(layer):
                total += c.indexer.n_heads * c.indexer.head_dim * rows
            if not compresses or c.has_indexer(layer):
                rows = min(rows, c.indexer.topk)
        total += c.num_attention_heads * row_products(c) * (rows + window)
    return total


def row_products(config: Config) -> int:
    """Multiply-adds of a query and a row: of its key, and of its value, which may be the same."""
    rotated = config.qk_rope_head_dim if config.family.attention == "latent" else 0
    return 2 * config.kv_lora_rank + rotated


@dataclass(frozen=True)
class Split:
    """How missing experts are divided: ``mode`` is ``fetch``, ``cpu`` or ``hybrid``, ``cost`` how
    many records are copied to the GPU while the CPU computes one for a token."""

    mode: str = "fetch"
    cost: float = 1.0

    def for_cpu(self, tokens: int, uses: Sequence[int], missing: int) -> int:
        """How many of a layer's absent experts the CPU computes, the first of ``uses``: how many of
        the pass's ``tokens`` use each, the fewest first.  ``missing`` counts what is coming too."""
        if tokens == 1 and self.mode == "cpu":
            return len(uses)
        if tokens == 1 and missing < 2:
            return 0  # its copy is there before the CPU has begun
        absent = uses if tokens > 1 else [1] * missing
        best, spent, least = 0, 0.0, float(len(absent))
        for count, wanted in enumerate(absent, 1):
            spent += self.cost * max(1.0, wanted / BOUND_TOKENS)
            both = max(spent, len(absent) - count)
            if both < least:
                best, least = count, both
        return min(len(uses), best)
