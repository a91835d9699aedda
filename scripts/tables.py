"""The docs' tables of what the code knows: ``python -m scripts.tables`` writes them into the pages.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``.
"""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from click.testing import CliRunner

import campaigns
from slotmoe.jsonfile import Json
from slotmoe.model.config import read_config
from slotmoe.model.families import FAMILIES, Family
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.sizes import format_size
from slotmoe.tools.cli import cli
from slotmoe.tools.plan import GROUPS, figure
from slotmoe.tools.serve.anthropic import MessagesRequest
from slotmoe.tools.serve.openai import ChatRequest, CompletionRequest
from slotmoe.tools.serve.requests import Fields
from slotmoe.tools.serve.responses import ResponsesRequest

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
REQUESTS: dict[str, type[Fields]] = {
    "chat": ChatRequest,
    "text": CompletionRequest,
    "responses": ResponsesRequest,
    "messages": MessagesRequest,
}
MODELS = {
    "deepseek_v2": "V2, V2.5, Coder-V2, V2-Lite",
    "deepseek_v3": "V3, R1, V3.1, Moonlight, GigaChat 3",
    "kimi_k2": "Kimi K2",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "mistral4": "Mistral Small 4",
    "deepseek_v32": "DeepSeek-V3.2",
    "glm_moe_dsa": "GLM-5",
    "deepseek_v4": "V4-Flash, V4-Pro",
    "qwen3_moe": "Qwen3-30B-A3B, -235B-A22B, Qwen3-Coder",
    "glm4_moe": "GLM-4.5, -Air, 4.6, 4.7",
    "minimax_m2": "MiniMax-M2",
    "gpt_oss": "gpt-oss-20b, -120b",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3_next": "Qwen3-Next-80B-A3B, Qwen3-Coder-Next",
    "qwen3_5_moe_text": "Qwen3.5 and 3.6: 35B-A3B and larger",
    "kimi_linear": "Kimi-Linear-48B-A3B",
    "dots1": "dots.llm1",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "ernie4_5_moe": "ERNIE-4.5",
    "sarvam_mla": "Sarvam-105B",
}
GEOMETRIES = {  # their parameters, as the publisher rounds them
    "v2-lite": "16B",
    "moonlight": "16B",
    "glm-4.7-flash": "30B",
    "gpt-oss-20b": "21B",
    "qwen3-30b-a3b": "31B",
    "qwen3.6-35b-a3b": "35B",
    "kimi-linear-48b-a3b": "48B",
    "qwen3-next-80b-a3b": "80B",
    "glm-4.5-air": "107B",
    "gpt-oss-120b": "117B",
    "mistral-small-4": "119B",
    "minimax-m2": "229B",
    "qwen3-235b-a22b": "235B",
    "v2": "236B",
    "v3": "671B",
    "v3.2": "671B",
    "glm-5": "744B",
    "kimi-k2": "1T",
    "v4-flash": "284B",
    "v4-pro": "1.6T",
}
_RESIDENT = GROUPS["resident weights"].split(", ")
_OTHERS = {  # machines beside those of memory-and-planning.md
    "no GPU, 8 GiB of RAM, a laptop": "--device cpu --threads 4 --ram 5GiB --disk-bandwidth 2GB",
    "a GPU of 80 GB, 256 GiB of RAM": "--gpu h100 --threads 32 --ram 240GiB --disk-bandwidth 7GB",
}
_GPUS = "rtx-3060", "rtx-4090", "rx-7900-xtx", "arc-b580", "radeon-780m"
_ON_VULKAN = {
    "V2-Lite, in slots": "v2-lite --ram 24GiB",
    "half, in RAM the rest": "v2-lite --ram 24GiB --slots 832",
    "V2, 200 GiB of RAM": "v2 --ram 200GiB",
}
_CHOOSING = {"v2-lite": "V2-Lite", "glm-4.7-flash": "GLM-4.7-Flash"}
_CHOOSING |= {"gpt-oss-120b": "gpt-oss-120b", "v2": "V2"}


def _fields(schema: Any, models: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Name and note of each field at the top, and of those inside that have a note."""
    for name, value in schema.get("properties", {}).items():
        note = value.get("description", "")
        if (note or not place) and not note.startswith("refused"):
            yield f"`{place}{name}`", note
        for model in _models(value):
            inner = {known: models[known] for known in models if known != model}
            if model in models:  # not inside of itself
                yield from _fields(models[model], inner, f"{place}{name}.")


def _models(schema: Any) -> Iterator[str]:
    """Names of the models in a field's ``schema``."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        schema = [value for key, value in schema.items() if key != "discriminator"]
    if isinstance(schema, list):
        for value in schema:
            yield from _models(value)


def honoured() -> Iterator[str]:
    fields = dict[str, list[str]]()
    for route, request in REQUESTS.items():
        schema = request.model_json_schema()
        for name, note in dict.fromkeys(_fields(schema, schema["$defs"])):
            fields.setdefault(f"{name} ({note})" if note else name, []).append(route)
    return _by_routes(fields)


def refused() -> Iterator[str]:
    fields = dict[str, list[str]]()
    for route, request in REQUESTS.items():
        for name, reason in request.refused.items():
            fields.setdefault(f"`{name}` ({reason})", []).append(route)
    return _by_routes(fields)


def _by_routes(fields: Json) -> Iterator[str]:
    """A row for the fields that have the same routes."""
    rows = dict[str, list[str]]()
    for field, routes in fields.items():
        which = "all" if len(routes) == len(REQUESTS) else ", ".join(routes)
        rows.setdefault(which, []).append(field)
    yield from _table("routes | fields", ((which, ", ".join(of)) for which, of in rows.items()))


def _attention(family: Family) -> Iterator[str]:
    yield family.attention
    yield "delta rules" * family.delta
    yield "sparse" * family.indexed
    yield "queries grow with position" * family.query_scaling
    yield "sinks" * family.sinks
    yield {"": "", "head": "heads normed", "row": "rows normed"}.get(family.qk_norm, "")


def families() -> Iterator[str]:
    rows = dict[Family, list[str]]()
    for model_type, family in FAMILIES.items():
        rows.setdefault(family, []).append(model_type)
    yield from _table(
        "`model_type` | models | gate | attention",
        (
            (
                ", ".join(f"`{model_type}`" for model_type in types),
                ", ".join(MODELS[model_type] for model_type in types),
                family.scoring + ", biased choice" * family.correction_bias,
                ", ".join(filter(None, _attention(family))),
            )
            for family, types in rows.items()
        ),
    )


@cache
def _planned(*arguments: str) -> Json:
    """What ``slotmoe plan --json`` prints on a machine that measured no bandwidths."""
    nowhere = {"SLOTMOE_CACHE": "/dev/null/cache"}
    return json.loads(CliRunner().invoke(cli, ["plan", *arguments, "--json"], env=nowhere).stdout)


@cache
def _machines() -> dict[str, str]:
    """Options of the three machines of memory-and-planning.md, by what its commands call them."""
    page = next(path for path in PAGES if path.stem == "memory-and-planning").read_text()
    commands = re.findall(r"(?m)^slotmoe plan v2 (.*?) *# (\w: .*)", page)
    return {name: options for options, name in commands}


def _on_machines(model: str) -> list[Json]:
    return [_planned(model, *options.split()) for options in _machines().values()]


def choosing() -> Iterator[str]:
    """Speeds of the default codes and of small ones; - is what does not fit."""

    def cell(model: str, options: str) -> str:
        choices = _planned(model, *options.split())["choices"]
        small = next(it for it in choices if (it["bits"], it["resident"]) == ("3", "mixed"))
        planned = next(choice for choice in choices if choice["planned"])
        speeds = (choice["decode_tokens_per_second"] for choice in (planned, small))
        return " / ".join(figure(speed, 2) if speed else "-" for speed in speeds)

    (laptop, large), three = _OTHERS.items(), _machines().items()
    yield from _table(
        f"machine | `slotmoe plan MODEL` with | {' | '.join(_CHOOSING.values())}",
        (
            (name, f"`{options}`", *(cell(model, options) for model in _CHOOSING))
            for name, options in (laptop, *three, large)
        ),
    )


def _parts(report: Json, tier: str, names: Iterable[str]) -> int:
    return sum(report["components"].get(name, {}).get(tier, 0) for name in names)


def _resident(model: str) -> str:
    """GB of resident weights, int8 and mixed."""
    reports = [_needs(model, mode) for mode in ("int8", "mixed")]
    sizes = [_parts(report, "ram", _RESIDENT) / 1e9 for report in reports]
    return " / ".join(f"{size:.1f}" for size in sizes) + " GB"


def _needs(model: str, mode: str = "int8") -> Json:
    return _planned(model, "--device", "cpu", "--ram", "64GiB", "--resident", mode)


def _token_bytes(model: str) -> int:
    """Of the experts that one token uses."""
    config = read_config(geometry_path(model))
    return len(config.moe_layers) * config.num_experts_per_tok * _needs(model)["record_bytes"]


def machines() -> Iterator[str]:
    columns = [dict(_machine(report)) for report in _on_machines("v2")]
    rows = ([name, *(column[name] for column in columns)] for name in columns[0])
    return _table("V2, 236B | A | B | C", rows)


def _machine(report: Json) -> Iterator[tuple[str, str]]:
    def gib(size: int, digits: int = 1) -> str:
        return f"{size / (1 << 30):.{digits}f} GiB"

    fast = "vram" if "vram" in report["budget"] else "ram"
    parts, bound = report["components"], report["bottleneck"]
    count = "all" if report["slots"] == report["experts"] else f"{report['slots']:,}"
    hosted = report["host_slots"]
    resident = gib(_parts(report, fast, _RESIDENT))
    yield "resident weights", f"{report['resident']['precision']}, {resident}"
    yield "KV cache, 4,096 tokens", gib(parts["KV cache"][fast], 2)
    slots = parts["expert slots"]
    experts = f"experts on the fast tier, of {report['experts']:,}"
    yield experts, f"{count}, {gib(slots[fast])}"
    yield "experts in RAM below it", f"{hosted:,}, {gib(slots['ram'])}" if hosted else "none"
    yield "largest context", f"{report['largest_context']:,}"
    speed = figure(report["decode_tokens_per_second"], 2)
    yield "decode, tokens/s", "estimated " * report["estimated"] + speed
    yield "bound by", "the time between kernels" if bound == "between kernels" else bound


def vulkan() -> Iterator[str]:
    """Milliseconds in memory, over the link and between kernels, and tokens a second."""

    def cell(gpu: str, options: str) -> str:
        report = _planned(*options.split(), "--device", "vulkan", "--gpu", gpu)
        if not report["fits"]:
            return "-"
        parts = ("GPU memory", "PCIe", "between kernels")
        spent = "+".join(figure(1e3 * report["decode_seconds"][part], 2) for part in parts)
        return f"{spent}: {figure(report['decode_tokens_per_second'], 2)}"

    rows = ((gpu, *(cell(gpu, options) for options in _ON_VULKAN.values())) for gpu in _GPUS)
    return _table(f"GPU | {' | '.join(_ON_VULKAN)}", rows)


def models() -> Iterator[str]:
    yield from _table(
        "geometry | parameters | export | resident weights, int8 / mixed | experts of one token"
        " | A: CPU, 16 GiB | B: 12 GB GPU, 32 GiB | C: 24 GB GPU, 64 GiB",
        (
            (
                f"`{model}`",
                parameters,
                f"{_needs(model)['disk']['export'] / 1e9:.0f} GB",
                _resident(model),
                f"{_token_bytes(model) / 1e9:.2f} GB",
                *map(_speed_or_shortfall, _on_machines(model)),
            )
            for model, parameters in GEOMETRIES.items()
        ),
    )


def _speed_or_shortfall(report: Json) -> str:
    missing = " and ".join(map(format_size, report["shortfall_by_tier"].values()))
    return f"no: {missing} short" if missing else figure(report["decode_tokens_per_second"], 2)


def _table(head: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f"| {head} |".replace("|  |", "| |")
    yield "|" + "---|" * len(head.split(" | "))
    for row in rows:
        yield f"| {' | '.join(row)} |".replace("|  |", "| |")


TABLES = {
    "honoured": honoured,
    "refused": refused,
    "families": families,
    "campaigns": campaigns.table,
    "choosing": choosing,
    "machines": machines,
    "models": models,
    "vulkan": vulkan,
}


def written(page: str) -> str:
    """The text of a page with its tables as the code has them."""

    def table(match: re.Match[str]) -> str:
        return "\n".join([match[1], *TABLES[match[2]](), match[3]])

    return re.sub(r"(?s)(<!-- table: (\w+) -->)\n.*?(<!-- /table -->)", table, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text()))
