"""How weights are coded unless said, what multiplies them, what codes were measured to lose, and
which of them lose least within a size."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
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
    if config.family.attention != "latent" or config.indexer or config.hyper or config.delta:
        problem = f"{config.family.architecture} is not there yet on Vulkan"
        raise ConfigError(f"{problem}; use --device cpu")


BY_TORCH = (
    "Triton's kernels lack these codes: torch's operations multiply on CUDA, slower than said"
)


@cache
def measured() -> Json:
    """What codes cost on the bundled sample: KL divergence in nats a token, as ``python -m bench
    codes`` writes it to ``divergence.json``: ``rows``, and points of ``llama.cpp``, whose
    ``origin`` is what measured them."""
    found: Json = json.loads(Path(__file__).with_name("divergence.json").read_bytes())
    return found


def takes_text(choice: Json) -> bool:
    """Whether ``--calibrate`` makes other codes of a ``codec`` or for ``resident`` weights."""
    return choice.get("codec") == "lut" or choice.get("resident") in ("int6", "int5", "mixed")


def expected(
    config: Config, codec: str, bits: str, resident: str, calibrated: bool
) -> float | None:
    """Of experts and resident weights together: the sum of what each does alone.  None where a
    part of it was not measured; codes that are kept, and bf16, cost nothing."""
    experts = 0.0 if codec in KEPT_CODECS else _alone({"codec": codec, "bits": bits}, calibrated)
    others = 0.0 if resident == "bf16" else _alone({"resident": resident}, calibrated)
    if " " in resident:
        groups = groups_of(config).items()
        others = sum(_part(group, names[0], resident, calibrated) for group, names in groups)
    return None if experts is None or others is None else experts + others


def _alone(choice: Json, calibrated: bool) -> float | None:
    wanted = choice | {"calibrated": calibrated and takes_text(choice)}
    found = (row for row in measured()["rows"] if wanted.items() <= row.items())
    return next((row["kl_divergence"] for row in found), None)


Group = tuple[str, int]  # resident matrices of a kind in a third of the depth, which have one code
# Squared relative errors of codes, beside lut4's, with which groups were measured; a text leaves a
# part.  Three bits are left out: attention by groups lost a multiple of that.
_SQUARED = {"none": 0.0, "int8": 0.009, "int6": 0.075, "int5": 0.3, "lut4": 1.0}
_LEFT = 0.4
# What stands for a kind of the same role that was not measured.
_LIKE = {"matrix": "self_attn.o_proj", "sensitive": "self_attn.kv_a_proj_with_mqa"}
_LIKE |= {"absorbed": "self_attn.kv_b_proj", "embedding": "embed_tokens"}


def groups_of(config: Config) -> dict[Group, list[str]]:
    """All groups, and the names in them."""
    groups: dict[Group, list[str]] = {}
    for name in filter(lambda name: role_of(name) in _LIKE, resident_shapes(config)):
        layer, kind = shapes.kind_of(name)
        groups.setdefault((kind, 3 * layer // config.layer_count), []).append(name)
    return groups


def _part(group: Group, name: str, resident: str, calibrated: bool) -> float:
    """What a group that has ``name`` adds to what resident weights are expected to lose."""
    known, (kind, third), role = measured()["groups"], group, role_of(name)
    thirds: list[float] = known[kind if kind in known else _LIKE[role]]
    stored = shapes.resident_quantization(role, resident, name)
    code, left = (stored.name, _LEFT) if isinstance(stored, Codec) else (stored, 1.0)
    lost = thirds[min(third, len(thirds) - 1)]
    return lost * _SQUARED[code] * (left if calibrated else 1.0)


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


def _codes(config: Config, group: Group, calibrated: bool, triton: bool) -> list[Fit]:
    """What a group may have, the smallest first: ``loss`` is its part of one, as ``resident``."""
    names, all_shapes = groups_of(config)[group], resident_shapes(config)
    codes, role = list[Fit](), role_of(names[0])
    first, last = (shapes.kind_of(name)[0] for name in (names[0], names[-1]))
    allowed = ["int8"]
    if role in ("matrix", "sensitive"):
        allowed += ["lut4", *(["int6", "int5"] * (not triton))]
        small = role == "sensitive" and "self_attn" in group[0]  # no decoder has an MLP in bf16
        allowed += ["none"] * small
    for code in allowed:
        rule = "" if code == "int8" else f" {group[0]}@{first}-{last}={code}"
        lost = _part(group, names[0], "int8" + rule, calibrated)
        sizes = (shapes.resident_bytes(role, all_shapes[n], "int8" + rule, n) for n in names)
        codes.append(Fit(sum(sizes), lost, rule, DEFAULT_CODECS))
    return sorted(codes)


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
    groups = [_codes(config, group, calibrated, triton) for group in groups_of(config)]
    smallest, found = "int8" + "".join(codes[0].resident for codes in groups), list[Fit]()
    for (codec, bits), experts in expert_choices(config).items():
        lost = expected(config, codec, bits, "bf16", calibrated)
        lacks = triton and gpu_kernels("int8", experts) == "torch"
        if lost is not None and not lacks and codecs in (None, experts):
            nbytes = export_bytes(config, sizes_of(config, smallest, experts))
            found.append(_raised(groups, Fit(nbytes, lost, smallest, experts), size, loss))
    by_size = size < inf
    good = [fit for fit in found if fit.nbytes <= size and (by_size or fit.loss <= loss)]
    if good:
        return min(good, key=lambda fit: fit[1::-1] if by_size else fit[:2])
    best = min(found, key=lambda fit: fit[:2] if by_size else fit[1::-1])
    most = f"{format_size(best.nbytes)} and lose about {best.loss:.2g} nats a token"
    if by_size:
        more = f"--fit {-(-best.nbytes >> 20)}MiB, fewer --bits or a smaller model"
        raise ConfigError(f"no codes are as small as --fit: the smallest take {most}; give {more}")
    more = "a larger --kl, more --bits or --calibrate"
    raise ConfigError(f"no codes lose as little as --kl: the best take {most}; give {more}")


def _raised(groups: Sequence[Sequence[Fit]], fit: Fit, size: float, loss: float) -> Fit:
    """From the smallest codes on always the step that gains most for its bytes, until no more
    ``size`` is left, or all with experts, which ``fit`` has alone, lose no more than ``loss``."""
    now = [codes[0] for codes in groups]
    nbytes, alone = fit[:2]
    while (lost := alone + sum(code.loss for code in now)) > loss:
        steps = [
            ((old.loss - new.loss) / (new.nbytes - old.nbytes), at, new)
            for at, (codes, old) in enumerate(zip(groups, now, strict=True))
            for new in codes
            if old.nbytes < new.nbytes <= old.nbytes + size - nbytes
        ]
        if not steps:
            break
        _, at, new = max(steps)
        nbytes, now[at] = nbytes + new.nbytes - now[at].nbytes, new
    return Fit(nbytes, lost, "int8" + "".join(code.resident for code in now), fit.codecs)
