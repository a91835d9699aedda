"""How fast a plan can run: bytes over bandwidth, and what was measured of the rest.  Without torch.

Bandwidths and the speed of a core are the machine's own (``slotmoe bench --calibrate`` stores
them), given by the user, or assumed, and the report says which.  The other constants here are
measurements of this project, named beside them and in the report.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import read_json
from slotmoe.model.config import Config
from slotmoe.offload.plan.attention import attention_products, kv_read_bytes
from slotmoe.offload.plan.memory import HELP_BYTES, PREFILL_CHUNK, Plan, Sizes, sizes_of
from slotmoe.offload.shared_files import write_note
from slotmoe.quant.codecs.codec import DEFAULT_CODECS

KERNEL_SHARE = 0.95  # of the bandwidth, RAM's or of cores, that decode reaches (2 Zen 4 cores)
PREFILL_SHARE = 0.75  # of the kernels' speed that prefill reaches (V2-Lite, 2 Zen 5 cores)
GPU_SHARE = 0.6  # the same on a GPU: assumed, not measured
GPU_LAUNCHES = 8  # kernels of a layer in one graph, counted by a test; one more with q-LoRA
GPU_LAUNCH_SECONDS = 1.5e-6  # between two kernels of a graph: assumed
# From the end of a layer's last copy to the next layer's first: its experts and the next layer's
# kernels, then the host, which wakes and queues.  By the clocks of the tests' twin.
GPU_MISS_SECONDS = 1.2e-4
TOKEN_SECONDS = 5e-4  # Python and torch of a token: 0.4 ms with the sample, 1.2 with V2-Lite
LAYER_SECONDS = 2e-4  # the same of a layer with a call of its own
MISS_SECONDS = 1.7e-4  # Python, a colder read and a kernel call for an expert read by the decoder
# Hits of the default policy against the share of experts in slots: the sample, held-out texts.
TEXT_HITS = ((0.0, 0.0), (0.1, 0.31), (0.25, 0.56), (0.5, 0.8), (1.0, 1.0))
CORE = ("int8_products", "coded_products", "attention_products", "core_bytes")
# What every prediction takes for granted, by its name in the report: on a CPU, and on a GPU.
CPU_CONSTANTS = {
    "decode's share of the bandwidth": KERNEL_SHARE,
    "prefill's share of a core's products": PREFILL_SHARE,
    "seconds of Python a token": TOKEN_SECONDS,
    "a layer by itself": LAYER_SECONDS,
    "a small read": MISS_SECONDS,
}
GPU_CONSTANTS = {
    "share of GPU memory's bandwidth": GPU_SHARE,
    "kernels a layer": GPU_LAUNCHES,
    "seconds between two": GPU_LAUNCH_SECONDS,
    "a layer that waits": GPU_MISS_SECONDS,
}
MEASURED = ("ram", "disk", "latency", "gpu", "pcie", "pcie_busy", "experts", *CORE)
# Products and bytes of a core beside those with AVX-512, by the first letters of the instruction
# set: one Zen 5 core, by its caches.  NEON is a guess.
SETS = {"avx2": (0.25, 0.7), "avxvnni": (0.55, 1.0), "neon": (0.25, 0.7), "portable": (0.02, 0.03)}


@dataclass(frozen=True)
class Bandwidths:
    """Bytes a second of each tier, seconds of one small read, what a core gets through in a second,
    and where the figures come from: ``assumed``, ``given`` or ``measured on DATE``."""

    ram: float = 40e9
    disk: float = 2e9
    gpu: float = 500e9
    pcie: float = 25e9
    pcie_busy: float = 20e9  # the same while the CPU computes experts
    experts: float = 0.0  # records that the CPU's kernels get through meanwhile; 0: see beside_gpu
    latency: float = 1e-4  # seconds of one small read from the disk
    # Of a core: multiply-adds of many tokens by int8 weights, by coded ones, and in attention; and
    # bytes of weights for one token.
    int8_products: float = 110e9
    coded_products: float = 110e9
    attention_products: float = 200e9
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
        """``experts``, or if it was not measured what copies to the GPU leave of the RAM's
        bandwidth, half of it at least."""
        ram = KERNEL_SHARE * self.ram
        return self.experts or max(ram - self.pcie_busy, ram / 2)


def stored_bandwidths(path: Path) -> Bandwidths:
    """What ``store_bandwidths`` wrote to ``path``, or assumptions.  Raises ``ConfigError``."""
    if not path.is_file():
        return Bandwidths()
    stored = read_json(path, 1 << 16)
    values = {name: stored[name] for name in MEASURED if stored.get(name) is not None}
    if not all(isinstance(rate, int | float) and 0 < rate < 1e15 for rate in values.values()):
        problem = "is not what slotmoe bench --calibrate writes; delete it or run that again"
        raise ConfigError(f"{path}: {problem}")
    return Bandwidths().updated(f"measured on {str(stored.get('date'))[:10]}", **values)


def store_bandwidths(path: Path, **values: float) -> None:
    """Store measured figures, named as in ``MEASURED``; those not given are forgotten."""
    assert set(values) <= set(MEASURED)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_note(path, {**values, "date": date.today().isoformat()})


@dataclass(frozen=True)
class Speed:
    """A predicted speed (of prefill None where nothing that is modelled bounds it), the hit rate
    assumed, and what a decoded token waits for, its ``bottleneck`` longest.  Commands give it under
    these names as JSON."""

    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float
    hit_rate: float
    decode_seconds: dict[str, float]
    bottleneck: str


def text_hits(share: float) -> float:
    """Hit rate on text with ``share`` of the experts in slots: ``TEXT_HITS``, interpolated."""
    after = min(max(1, bisect_left(TEXT_HITS, (share, 0.0))), len(TEXT_HITS) - 1)
    (x0, y0), (x1, y1) = TEXT_HITS[after - 1], TEXT_HITS[after]
    return y0 + (y1 - y0) * (min(share, 1.0) - x0) / (x1 - x0)


@dataclass(frozen=True)
class Setting:
    """A plan, the machine it runs on, and the routing to expect.  ``random_routing``: a token may
    use any expert, as with the weights of ``slotmoe synth``; else it uses experts as text does.
    ``misses`` says how a GPU's missing experts are computed (``slotmoe.offload.policy.hybrid``)."""

    config: Config
    sizes: Sizes
    plan: Plan
    bandwidths: Bandwidths
    threads: int
    random_routing: bool
    misses: str = "fetch"

    def hits(self, slots: int) -> float:
        """Hit rate to expect of so many slots."""
        share = slots / (len(self.config.moe_layers) * self.config.n_routed_experts)
        return share if self.random_routing else text_hits(share)

    def predict(self, prompt_tokens: int, new_tokens: int) -> Speed:
        """Speed for a prompt and its continuation, with the slots full: a cold start is slower."""
        seconds = self._decode_seconds(prompt_tokens + new_tokens // 2)
        disk = seconds["disk"]
        computing = sum(seconds.values()) - disk
        # Reads hide behind computing, but not perfectly; the computing thread makes small ones.
        small = self.sizes.record_bytes <= HELP_BYTES
        total = computing + disk if small else math.hypot(computing, disk)
        prefill, hit_rate = self._prefill(prompt_tokens), self.hits(self.plan.slots)
        return Speed(prefill, 1 / total, hit_rate, seconds, max(seconds, key=seconds.__getitem__))

    def _decode_seconds(self, depth: int) -> dict[str, float]:
        c, rates, record = self.config, self.bandwidths, self.sizes.record_bytes
        on_cpu, small, K = self.plan.tier == "ram", record <= HELP_BYTES, c.num_experts_per_tok
        used = len(c.moe_layers) * K
        latents = kv_read_bytes(c, depth, "native" if on_cpu else "triton")
        touched = self.sizes.touched + latents + used * record
        missing = used * (1 - self.hits(max(self.plan.slots, self.plan.host_slots)))
        read_seconds = rates.latency + MISS_SECONDS if small else record / rates.disk
        between = c.num_hidden_layers * LAYER_SECONDS
        if not on_cpu:
            # All resident layers are one graph; a layer with a miss waits for the host.
            launches = GPU_LAUNCHES + (c.q_lora_rank is not None)
            between = c.num_hidden_layers * launches * GPU_LAUNCH_SECONDS
            between += len(c.moe_layers) * (1 - self.hits(self.plan.slots) ** K) * GPU_MISS_SECONDS
        elif missing == 0 or small:
            # Nothing is read ahead, so only a miss comes between two layers.
            alone = len(c.moe_layers) * (1 - (1 - missing / used) ** K)
            between = TOKEN_SECONDS + alone * LAYER_SECONDS
        seconds = {"between kernels": between, "disk": missing * read_seconds}
        if on_cpu:
            attention = attention_products(c, depth)
            return seconds | {
                # The cores may be too few to keep the RAM busy.
                "RAM": touched / min(rates.ram, self.threads * rates.core_bytes) / KERNEL_SHARE,
                "attention": attention / (self.threads * rates.attention_products),
            }
        experts = min(rates.beside_gpu(), self.threads * rates.core_bytes)
        absent = used * (1 - self.hits(self.plan.slots)) * record
        computed = {
            "fetch": {"PCIe": absent / rates.pcie},
            "cpu": {"CPU experts": absent / experts},
            "hybrid": {"PCIe and CPU experts": absent / (rates.pcie_busy + experts)},
        }
        return seconds | {"GPU memory": touched / rates.gpu / GPU_SHARE} | computed[self.misses]

    def _prefill(self, tokens: int) -> float | None:
        """Tokens a second of a prompt: each pass loads its experts once and reads all weights from
        RAM for every step; GPU computing is free."""
        c, rates, plan, record = self.config, self.bandwidths, self.plan, self.sizes.record_bytes
        experts, K = len(c.moe_layers) * c.n_routed_experts, c.num_experts_per_tok
        head = c.vocab_size * c.hidden_size  # only for the last token
        dense = sizes_of(c, "int8", DEFAULT_CODECS).touched - head
        routed = len(c.moe_layers) * K * 3 * c.hidden_size * c.moe_intermediate_size
        speed, seconds = self.threads * PREFILL_SHARE, 0.0
        each = dense / rates.int8_products + routed / rates.coded_products  # of a token, one core

        def used(tokens: int) -> float:  # bytes of experts
            return experts * (1 - (1 - K / c.n_routed_experts) ** tokens) * record

        for start in range(0, tokens, plan.prefill_chunk):
            chunk = min(tokens - start, plan.prefill_chunk)
            needed, step = used(chunk), min(chunk, PREFILL_CHUNK)
            disk = needed * (1 - self.hits(max(plan.slots, plan.host_slots))) / rates.disk
            if plan.tier == "ram":
                attended = attention_products(c, start + chunk // 2) / rates.attention_products
                read = (self.sizes.touched + used(step)) * chunk / step / rates.ram / KERNEL_SHARE
                seconds += math.hypot(max(chunk * (each + attended) / speed, read), disk)
            else:
                seconds += max(needed * (1 - self.hits(plan.slots)) / rates.pcie, disk)
        return tokens / seconds if seconds else None
