"""How well an export's predictor names experts in text it was not trained on."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import click
import torch

from slotmoe.model.config import Config
from slotmoe.model.names import GATE, POST_NORM, layer_tensor
from slotmoe.offload.model_source import read_model
from slotmoe.offload.predictor import NextGate, Predictor
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.study import calibrate
from slotmoe.offload.study.calibrate import Samples, read_text, split
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.export.reader import Export
from slotmoe.tools.bench import turns


def _predictors(folder: Path, config: Config) -> tuple[Predictor | None, NextGate]:
    """The export's predictor, and the untrained one that applies the next layers' gates."""
    with Export.open(folder) as export:
        tensors = export.predictor()
        pairs = product(export.layers, (POST_NORM, GATE))
        names = [layer_tensor(layer, part) for layer, part in pairs]
        weights = {name: export.resident(name) for name in names}
    plain = {name: w.float() for name, w in weights.items() if isinstance(w, torch.Tensor)}
    K, backend = config.num_experts_per_tok, TorchBackend()
    trained = None if tensors is None else Predictor(tensors, K, backend)
    return trained, NextGate(config, plain, backend)


def _recall(gate: NextGate, samples: Samples, guesses: list[int]) -> list[float]:
    """Recall of the untrained gates, for each number of guesses a layer."""
    total = torch.zeros(len(guesses))
    for start in range(0, len(samples.token), 4096):
        part = slice(start, start + 4096)
        rows = enumerate(samples.inputs[:, part])
        scores_TRE = torch.stack([gate.layer_scores(row, x_TD) for row, x_TD in rows], 1)
        shares = calibrate.recall(scores_TRE, samples.used[part, 1:], guesses)
        total += torch.tensor(shares) * len(scores_TRE)
    return (total / len(samples.token)).tolist()


@click.command()
@click.argument("folder", metavar="EXPORT", type=Path)
@click.argument("texts", metavar="TEXT...", nargs=-1, required=True, type=Path)
@turns.THREADS
def recall(folder: Path, texts: tuple[Path, ...], threads: int | None) -> None:
    """Print, for each TEXT and number of guesses a layer, the share of the used experts that were
    named and the share of guesses that were wasted."""
    config, _ = read_model(folder)
    predictor, untrained = _predictors(folder, config)
    K, context = config.num_experts_per_tok, min(1024, config.max_position_embeddings)
    guesses = [min(config.n_routed_experts, math.ceil(K * share)) for share in (1, 1.5, 2)]
    named: dict[str, dict[str, list[float]]] = {}  # by predictor and text
    with Runtime.open(folder, context=context, threads=threads) as runtime:
        for path in texts:
            ids = runtime.tokenizer.encode(read_text(path), add_bos=False)
            samples = calibrate.record(runtime, split(ids, runtime.tokenizer, runtime.context))
            shares_by_name = calibrate.measure(predictor, samples, guesses) if predictor else {}
            shares_by_name["untrained"] = _recall(untrained, samples, guesses)
            for name, shares in shares_by_name.items():
                named.setdefault(name, {})[path.name] = shares
    rows = []
    for name, by_text in named.items():
        mean = torch.tensor(list(by_text.values()), dtype=torch.float64).mean(dim=0).tolist()
        for text, shares in {**by_text, "mean": mean}.items():
            wasted = [1 - share * K / n for share, n in zip(shares, guesses, strict=True)]
            row = {"text": text, "predictor": name, "guesses": guesses}
            rows.append(row | {"named": shares, "wasted": wasted})
    turns.finish(rows)
