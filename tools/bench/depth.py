"""What a longer context costs: ``python -m slotmoe.tools.bench.depth EXPORT [--depth N] [--against
N]``.

Decode after few and after many cached tokens, in turn in one process, since the speed of a shared
machine changes between two runs of ``slotmoe bench``: the medians, and the median of the ratios
pair by pair with their range.
"""

from __future__ import annotations

import statistics
import time

import click
import torch

from slotmoe.offload.runtime import Runtime


def seconds(runtime: Runtime, depth: int, ids: list[int]) -> float:
    """Seconds of one token after ``depth`` cached ones; the first is left out, as it finds the rows
    where filling left them."""
    step = runtime.start(depth)
    step(ids[:1])
    started = time.perf_counter()
    for token in ids[1:]:
        step([token])
    return (time.perf_counter() - started) / (len(ids) - 1)


@click.command()
@click.argument("export")
@click.option(
    "--depth",
    type=click.IntRange(1),
    default=8192,
    show_default=True,
    help="Tokens cached before the long turns.",
)
@click.option(
    "--against",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Tokens cached before the short turns.",
)
@click.option(
    "--decode-tokens",
    type=click.IntRange(2),
    default=9,
    show_default=True,
    help="Tokens of one turn; the first is not counted.",
)
@click.option(
    "--repetitions", type=click.IntRange(1), default=15, show_default=True, help="Turns of each."
)
@click.option("--threads", type=click.IntRange(1), help="Threads (default: all cores).")
def main(
    export: str, depth: int, against: int, decode_tokens: int, repetitions: int, threads: int | None
) -> None:
    """Print milliseconds a token at both depths and the speed at --depth over that at --against."""
    if against >= depth:
        raise click.UsageError(
            f"--against is {against}, expected less than --depth, which is {depth}"
        )
    ids = torch.randint(
        2, 1000, (decode_tokens,), generator=torch.Generator().manual_seed(0)
    ).tolist()
    with Runtime.open(export, context=depth + decode_tokens, threads=threads) as runtime:
        runtime.warm()
        seconds(runtime, depth, ids), seconds(runtime, against, ids)
        # Turns change, so that neither is always the one that follows the other's filling of the
        # cache.
        turns = [
            (against, depth) if number % 2 else (depth, against) for number in range(repetitions)
        ]
        pairs = [{each: seconds(runtime, each, ids) for each in turn} for turn in turns]
    short, long = ([pair[each] for pair in pairs] for each in (against, depth))
    ratios = [a / b for a, b in zip(short, long, strict=True)]
    for each, times in ((against, short), (depth, long)):
        print(
            f"after {each} tokens: {1e3 * statistics.median(times):.2f} ms a token ({1e3 * min(times):.2f}-{1e3 * max(times):.2f})"
        )
    print(
        f"speed after {depth} over that after {against}: {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
