"""How well an export's predictor names experts in text it was not trained on: ``python -m
slotmoe.tools.bench.recall EXPORT TEXT...``"""

from __future__ import annotations

import math
from pathlib import Path

import click


@click.command()
@click.argument(
    "folder", metavar="EXPORT", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.argument(
    "texts",
    metavar="TEXT...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
)
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="CPU threads. [default: physical cores]"
)
def command(folder: Path, texts: tuple[Path, ...], threads: int | None) -> None:
    """Print, for each TEXT, the share of the used experts that were named and the share of guesses
    that were wasted."""
    import torch

    from slotmoe.model.config import read_config
    from slotmoe.model.names import GATE, POST_NORM, layer_tensor
    from slotmoe.offload.predictor import NextGate, Predictor
    from slotmoe.offload.runtime import Runtime
    from slotmoe.offload.study.calibrate import measure, read_text, record, split
    from slotmoe.quant.backends.base import TorchOps
    from slotmoe.quant.export.reader import Export

    config = read_config(folder / "config.json")
    with Export.open(folder) as export:
        predictor = Predictor.load(export, config.num_experts_per_tok, TorchOps())
        names = [layer_tensor(layer, part) for layer in export.layers for part in (POST_NORM, GATE)]
        weights = {name: export.resident(name) for name in names}
    untrained = NextGate(
        config,
        {
            name: weight.float()
            for name, weight in weights.items()
            if isinstance(weight, torch.Tensor)
        },
        TorchOps(),
    )
    with Runtime.open(
        folder, context=min(1024, config.max_position_embeddings), threads=threads
    ) as runtime:
        K = config.num_experts_per_tok
        guesses = [min(config.n_routed_experts, math.ceil(K * share)) for share in (1, 1.5, 2)]
        totals: dict[str, torch.Tensor] = {}
        for path in texts:
            windows = split(
                runtime.tokenizer.encode(read_text(path), add_bos=False),
                runtime.tokenizer,
                runtime.context,
            )
            for name, shares in measure(
                predictor, record(runtime, windows), guesses, untrained
            ).items():
                totals[name] = totals.get(name, torch.zeros(len(guesses))) + torch.tensor(shares)
                _print(path.name, name, shares, guesses, K)
    for name, total in totals.items():
        _print("mean", name, (total / len(texts)).tolist(), guesses, K)


def _print(text: str, name: str, shares: list[float], guesses: list[int], K: int) -> None:
    parts = (
        f"{n} guesses {share:6.1%} named {1 - share * K / n:6.1%} wasted"
        for n, share in zip(guesses, shares, strict=True)
    )
    print(f"{text:24} {name:12} " + "   ".join(parts))


if __name__ == "__main__":
    command()
