"""What codes cost on the bundled sample: KL divergence by codec of experts and by kind of resident
weights, beside llama.cpp's codes, and a chart of that over the bytes that a token reads.

Only what a row names is quantized; everything else is as in the source, in float32 with plain
torch.  With ``--results offload/plan/divergence.json`` this command writes what ``slotmoe plan``
knows of divergences, in place of the figures there that something else has measured.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import click
from safetensors.torch import save_file

from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.config import read_config
from slotmoe.model.names import EMBEDDING, expert_name, resident_shapes, role_of
from slotmoe.offload.evaluate import Evaluation, read_texts, windows_of
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.model_cache import SAMPLE
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.precision import measured
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS, ExpertCodecs
from slotmoe.quant.codecs.weight import dequantize
from slotmoe.quant.export.reader import Export
from slotmoe.quant.shapes import RESIDENT_MODES, record_bytes, resident_bytes
from slotmoe.tools.options import require_extra
from slotmoe.tools.quantize import Paths, calibration_windows
from slotmoe.tools.tables import Console, table

WINDOW, WINDOWS = 513, 4  # of each text: 2,048 tokens
NF4 = EXPERT_CODECS["nf4", "4"]
_FIGURES = {  # and their formats
    "bits_per_weight": ".2f",
    "relative_rms_error": ".4f",
    "kl_divergence": ".5f",
    "gigabytes_per_token": ".3f",
}


def _rows(calibrated: bool) -> list[dict[str, Any]]:
    """What is measured."""
    rows: list[dict[str, Any]] = [{"codec": codec, "bits": bits} for codec, bits in EXPERT_CODECS]
    rows += [{"resident": mode} for mode in RESIDENT_MODES if mode != "bf16"]
    # A text makes no other codes of these two.
    fitted = [row for row in rows if calibrated and not {"nf4", "int8"} & {*row.values()}]
    ways = (rows, False), (fitted, True)
    return [row | {"calibrated": text} for some, text in ways for row in some]


def _setting(row: dict[str, Any]) -> dict[str, Any]:
    """What a row is of, without what was measured."""
    return {key: row[key] for key in row if key not in {*_FIGURES, "origin"}}


@click.command()
@click.option("--text", "texts", type=Path, multiple=True, required=True, help="Held-out text.")
@click.option("--calibrate", type=Path, multiple=True, help="Text of the calibrated rows.")
@click.option("--results", type=Path, required=True, help="JSON; rows made by this are kept.")
@click.option("--chart", type=Path, help="Where the chart goes: .svg or .png.")
@click.option("--rows", type=int, help="Measure at most so many; the next call goes on.")
def codes(
    texts: Paths, calibrate: Paths, results: Path, chart: Path | None, rows: int | None
) -> None:
    """Print what codes cost, and keep it in --results.  A row takes half a minute, a calibrated
    one two; a killed run goes on with the row that it was at."""
    if chart is not None:
        require_extra("plots")
    found = json.loads(results.read_text()) if results.exists() else {"rows": []}
    known = [_setting(row) for row in found["rows"] if "origin" not in row]
    missing = [row for row in _rows(bool(calibrate)) if row not in known][:rows]
    click.echo(f"{len(known)} rows are there, {len(missing)} to measure", err=True)
    for row in missing:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            others = [other for other in found["rows"] if _setting(other) != row]
            found["rows"] = [*others, row | _measure(row, texts, calibrate, Path(folder))]
        results.write_text(json.dumps(found, indent=1) + "\n")
        click.echo(f"{_name(row)}: {time.perf_counter() - started:.0f} s", err=True)
    _print(found["rows"])
    if chart is not None:
        _draw(found["rows"], chart)
    print(json.dumps(found))


def _measure(row: dict[str, Any], texts: Paths, calibrate: Paths, folder: Path) -> dict[str, Any]:
    """The figures of a row."""
    codecs = EXPERT_CODECS[row["codec"], row["bits"]] if "codec" in row else NF4
    windows = calibration_windows(SAMPLE, calibrate) if row["calibrated"] else None
    mode = row.get("resident", "bf16")
    quantize(SAMPLE, folder / "export", resident=mode, codecs=codecs, calibration=windows)
    error = _replace(folder, "codec" in row)
    size, weights = _per_token(codecs if "codec" in row else None, mode)
    return {
        "bits_per_weight": round(8 * size / weights, 3),
        "relative_rms_error": float(f"{error:.4g}"),
        "kl_divergence": float(f"{_divergence(folder / 'weights', texts):.4g}"),
        "gigabytes_per_token": round(size / 1e9, 4),
    }


def _per_token(codecs: ExpertCodecs | None, mode: str) -> tuple[int, int]:
    """Bytes that a token of V2-Lite reads, and of how many weights: of experts, or without
    ``codecs`` of resident weights."""
    config = read_config(geometry_path("v2-lite"))
    if codecs is not None:
        hidden, width = config.hidden_size, config.moe_intermediate_size
        uses = len(config.moe_layers) * config.num_experts_per_tok
        return uses * record_bytes(hidden, width, codecs), uses * 3 * hidden * width
    shapes = {name: shape for name, shape in resident_shapes(config).items() if name != EMBEDDING}
    size = sum(resident_bytes(role_of(name), shape, mode) for name, shape in shapes.items())
    return size, sum(map(math.prod, shapes.values()))


def _replace(folder: Path, experts: bool) -> float:
    """Write the sample with the export's experts, or its resident weights, into ``weights``;
    returns the relative RMS error of those that differ."""
    error = square = 0.0
    with open_checkpoint(SAMPLE) as checkpoint, Export.open(folder / "export") as export:
        tensors = {name: checkpoint.tensor(name) for name in checkpoint.infos}
        names = resident_shapes(checkpoint.config)
        made = {name: dequantize(export.resident(name)) for name in names}
        if experts:
            made = {
                expert_name(layer, expert, projection): weight
                for layer, expert in product(export.layers, range(export.experts))
                for projection, weight in export.expert(layer, expert).items()
            }
    for name, weight in made.items():
        difference = (weight.double() - tensors[name].double()).square().sum().item()
        error += difference
        square += tensors[name].double().square().sum().item() * bool(difference)
    (folder / "weights").mkdir()
    contiguous = {name: weight.contiguous() for name, weight in (tensors | made).items()}
    save_file(contiguous, folder / "weights" / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / "weights" / name).write_bytes((SAMPLE / name).read_bytes())
    return math.sqrt(error / square) if square else 0.0


def _divergence(folder: Path, paths: Paths) -> float:
    """KL divergence from the sample, nats a token."""
    texts = read_texts(paths, folder, SAMPLE)
    options: dict[str, Any] = {"quantize": False, "context": WINDOW}
    with Runtime.open(folder, **options) as ours, Runtime.open(SAMPLE, **options) as source:
        evaluation = Evaluation(ours, source)
        for text in texts:
            for _ in evaluation.run(text, windows_of(text, WINDOW, None)[:WINDOWS]):
                pass
        divergence: float = evaluation.report()["kl_divergence"]
    return divergence


_MARK, _MARKED = "*", "* measured by something else"


def _name(row: dict[str, Any]) -> str:
    what: list[str] = [f"--{key} {row[key]}" for key in ("codec", "bits", "resident") if key in row]
    return " ".join([*what, *["--calibrate"] * row["calibrated"]]) + _MARK * ("origin" in row)


def _print(rows: list[dict[str, Any]]) -> None:
    columns = ("", "bits a weight", "relative RMS", "KL, nats a token", "GB a token")
    for title, key in (("Experts", "codec"), ("Resident weights", "resident")):
        cells = []
        for row in (row for row in rows if key in row):
            shown = row | {"relative_rms_error": row["relative_rms_error"] or math.nan}
            cells.append((_name(row), *(f"{shown[n]:{form}}" for n, form in _FIGURES.items())))
        heading = f"{title} alone; bits and bytes of V2-Lite; {_MARKED}"
        Console(stderr=True).print(table(columns, cells, heading))


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    """KL divergence of experts' codes over what a token of V2-Lite reads of them."""
    from matplotlib.figure import Figure

    weights = _per_token(NF4, "bf16")[1]
    others = [
        {**row, "gigabytes_per_token": row["bits_per_weight"] * weights / 8e9}
        for row in measured()["llama.cpp"]
    ]
    ours = [row for row in rows if "codec" in row]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, style, points in (
        ("slotmoe", "o", [row for row in ours if not row["calibrated"]]),
        ("slotmoe, calibrated", "D", [row for row in ours if row["calibrated"]]),
        ("llama.cpp, with imatrix", "s", others),
    ):
        at = [(row["gigabytes_per_token"], row["kl_divergence"]) for row in points]
        if at:
            axes.plot(*zip(*at, strict=True), style, label=label)
        for row, position in zip(points, at, strict=True):
            name = row.get("name") or f"{row['codec']} {row['bits']}"
            name += _MARK * ("origin" in row)
            axes.annotate(name, position, (4, 4), textcoords="offset points", fontsize=7)
    axes.set(xlabel="GB of experts a token of V2-Lite reads", ylabel="KL divergence, nats a token")
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(title=_MARKED)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
