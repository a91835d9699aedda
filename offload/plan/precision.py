"""How weights are coded unless said, what multiplies them, what codes were measured to lose, and
which of them lose least within a size."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import NamedTuple

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.model.config import Config
from slotmoe.model.names import resident_shapes, role_of
from slotmoe.offload.plan.memory import default_codecs, export_bytes, sizes_of
from slotmoe.quant import shapes
from slotmoe.quant.codecs.codec import (
    DEFAULT_CODECS,
    EXPERT_CODECS,
    KEPT_CODECS,
    TRITON_KINDS,
    Codec,
    ExpertCodecs,
)
from slotmoe.quant.shapes import RESIDENT_MODES
from slotmoe.sizes import format_size

MOST_INT8 = 4 << 30  # bytes of resident weights; beyond, 4 bits leave much more to the experts


def precision_of(config: Config, wanted: str) -> str:
    """How resident weights are stored, a ``FITTED_MODE``.  ``auto`` is int8, closest to the
    source, up to ``MOST_INT8``.  It knows no machine, so that plan, quantize and run choose alike,
    and an export has the same bytes wherever it is made.  Raises ``ConfigError``."""
    if wanted == "auto":
        return "int8" if int8_bytes(config) <= MOST_INT8 else "mixed"
    if not re.match(shapes.FITTED_MODE, wanted):
        known = ", ".join(("auto", *RESIDENT_MODES))
        raise ConfigError(f"resident {wanted!r:.40} is unknown, expected one of: {known}")
    return wanted


def brief(resident: str) -> str:
    """A ``FITTED_MODE`` in a word."""
    return "fitted" if " " in resident else resident


def int8_bytes(config: Config) -> int:
    return sum(sizes_of(config, "int8", DEFAULT_CODECS).resident.values())


def gpu_kernels(resident: str, codecs: ExpertCodecs) -> str:
    """What multiplies on a GPU: torch where Triton's kernels lack a code."""
    has_all = {codec.kind for codec in codecs} <= TRITON_KINDS
    return "triton" if has_all and not re.search("int[56]", resident) else "torch"


def kernels_for(asked: str, is_gpu: bool, codecs: Mapping[str, Codec]) -> str:
    """As asked, but torch's on a GPU whose kernels lack a codec.  Raises ``ConfigError``."""
    lacking = [name for name, codec in codecs.items() if codec.kind not in TRITON_KINDS]
    if lacking and asked == "triton":
        problem = f"kernels triton: multiply no {' and '.join(lacking)}"
        raise ConfigError(f"{problem}, in which the export is coded; use kernels torch")
    return "torch" if lacking and is_gpu and asked == "auto" else asked


def check_vulkan(config: Config) -> None:
    """Raises ``ConfigError`` for a model that Vulkan's shaders do not compute."""
    family, grouped = config.family, config.grouped
    apart = (config.indexer, config.compressed, config.hyper, config.delta, *config.windows)
    more = family.sinks or family.logit_bias or family.expert_biases or family.shared_gate
    if any(apart) or more or (grouped and "o" in grouped.biased):
        problem = f"{config.family.architecture} is not there yet on Vulkan"
        raise ConfigError(f"{problem}; use --device cpu")


@cache
def measured() -> Json:
    """What codes cost on the bundled sample: KL divergence in nats a token, as ``python -m bench
    codes`` writes it to ``divergence.json``: ``rows``, and points of ``llama.cpp``, whose
    ``origin`` is what measured them."""
    found: Json = json.loads(Path(__file__).with_name("divergence.json").read_bytes())
    return found


def expected(config: Config, codec: str, bits: str, resident: str, calibrated: bool) -> float:
    """Of experts and resident weights together: the sum of what each does alone.  Codes that are
    kept, and bf16, cost nothing."""
    lost = 0.0 if codec in KEPT_CODECS else _alone({"codec": codec, "bits": bits}, calibrated)
    lost += 0.0 if resident == "bf16" else _alone({"resident": resident.split()[0]}, calibrated)
    groups = groups_of(config).items() if " " in resident else ()
    return lost + sum(_more(group, names[0], resident, calibrated) for group, names in groups)


def _alone(choice: Json, calibrated: bool) -> float:
    """What was measured of a choice, with a text where that makes other codes."""
    found = (row for row in measured()["rows"] if choice.items() <= row.items())
    losses: dict[bool, float] = {row["calibrated"]: row["kl_divergence"] for row in found}
    return losses.get(calibrated, losses[False])


Group = tuple[str, int]  # resident matrices of a kind in a third of the depth, which have one code
# Squared relative errors of codes, beside lut4's, with which groups were measured; a text leaves a
# part.  Three bits are left out: attention by groups lost a multiple of that.
_SQUARED = {"none": 0.0, "int8": 0.009, "int6": 0.075, "int5": 0.3, "lut4": 1.0}
_LEFT = 0.4
# What stands for a kind of the same role that was not measured.
_LIKE = {"matrix": "self_attn.o_proj", "sensitive": "self_attn.kv_a_proj_with_mqa"}
_LIKE |= {"absorbed": "self_attn.kv_b_proj", "embedding": "embed_tokens"}


def code_of(name: str, resident: str) -> str:
    """How a resident weight is stored, in a word of ``_SQUARED``."""
    stored = shapes.resident_quantization(role_of(name), resident, name)
    return stored.name if isinstance(stored, Codec) else stored


def groups_of(config: Config) -> dict[Group, list[str]]:
    """All groups, and the names in them."""
    groups: dict[Group, list[str]] = {}
    for name in filter(lambda name: role_of(name) in _LIKE, resident_shapes(config)):
        layer, kind = shapes.kind_of(name)
        groups.setdefault((kind, 3 * layer // config.layer_count), []).append(name)
    return groups


def _more(group: Group, name: str, resident: str, calibrated: bool) -> float:
    """What a group that has ``name`` is expected to lose beyond what it does in int8."""
    known, (kind, third), code = measured()["groups"], group, code_of(name, resident)
    thirds: list[float] = known[kind if kind in known else _LIKE[role_of(name)]]
    left = _LEFT if calibrated and code not in ("none", "int8") else 1.0
    return thirds[min(third, len(thirds) - 1)] * (left * _SQUARED[code] - _SQUARED["int8"])


def expert_choices(config: Config) -> dict[tuple[str, str], ExpertCodecs]:
    """How experts may be coded, by ``--codec`` and ``--bits``: also as the checkpoint has them."""
    kept = default_codecs(config)
    return EXPERT_CODECS | ({} if kept == DEFAULT_CODECS else {(kept.down.name, "4"): kept})


class Fit(NamedTuple):
    """How a model is coded, bytes of the export, and the divergence that is expected."""

    nbytes: int
    loss: float
    resident: str
    codecs: ExpertCodecs


def fitted(
    config: Config,
    size: float = inf,
    loss: float = 0.0,
    codecs: ExpertCodecs | None = None,
    calibrated: bool = False,
    triton: bool = False,
) -> Fit:
    """The codes that lose least in ``size`` bytes, or lose at most ``loss`` nats a token in the
    fewest: of experts ``codecs`` or any, of resident matrices each group its own; with ``triton``
    those that its kernels have.  Raises ``ConfigError`` where none is as asked."""
    groups = [_codes(config, *group, calibrated, triton) for group in groups_of(config).items()]
    # From the smallest codes on always the step that gains most for its bytes.
    steps = sorted(
        ((old[1] - new[1]) / (new[0] - old[0]), at, old, new)
        for at, codes in enumerate(groups)
        for old, new in pairwise(codes)
    )
    found = list[Fit]()
    for (codec, bits), experts in expert_choices(config).items():
        alone, now = expected(config, codec, bits, "int8", calibrated), [it[0] for it in groups]
        lost = alone + sum(code[1] for code in now)
        nbytes = export_bytes(config, sizes_of(config, _mode(now), experts))
        if codecs not in (None, experts) or (triton and gpu_kernels("int8", experts) == "torch"):
            continue
        for _, at, old, new in reversed(steps):
            added = new[0] - old[0]
            if lost > loss and now[at] == old and nbytes + added <= size:
                nbytes, now[at] = nbytes + added, new
                lost = alone + sum(code[1] for code in now)
        found.append(Fit(nbytes, lost, _mode(now), experts))
    by_size = size < inf
    good = [fit for fit in found if fit.nbytes <= size and (by_size or fit.loss <= loss)]
    if good:
        return min(good, key=lambda fit: fit[1::-1] if by_size else fit[:2])
    best = min(found, key=lambda fit: fit[:2] if by_size else fit[1::-1])
    reach = f"{format_size(best.nbytes)} and lose about {best.loss:.2g} nats a token"
    if by_size:
        more = f"--fit {-(-best.nbytes >> 20)}MiB, fewer --bits or a smaller model"
        raise ConfigError(f"no codes are as small as --fit: the smallest take {reach}; give {more}")
    more = "a larger --kl, more --bits or --calibrate"
    raise ConfigError(f"no codes lose as little as --kl: the best take {reach}; give {more}")


Coding = tuple[int, float, str]  # of a group: bytes, what it adds to the loss, rule for a mode


def _mode(now: Iterable[Coding]) -> str:
    return "int8" + "".join(rule for *_, rule in now)


def _codes(
    config: Config, group: Group, names: list[str], calibrated: bool, triton: bool
) -> list[Coding]:
    """What a group may have, the smallest first."""
    all_shapes, codes, role = resident_shapes(config), list[Coding](), role_of(names[0])
    first, last = (shapes.kind_of(name)[0] for name in (names[0], names[-1]))
    allowed, is_coded = ["int8"], role in ("matrix", "sensitive")
    allowed += ["lut4"] * is_coded + ["int6", "int5"] * (is_coded and not triton)
    # No decoder has an MLP in bf16.
    allowed += ["none"] * (role == "sensitive" and "self_attn" in group[0])
    for code in allowed:
        rule = "" if code == "int8" else f" {group[0]}@{first}-{last}={code}"
        lost = _more(group, names[0], "int8" + rule, calibrated)
        sizes = (shapes.resident_bytes(role, all_shapes[n], "int8" + rule, n) for n in names)
        codes.append((sum(sizes), lost, rule))
    return sorted(codes)
