"""``slotmoe run``: a prompt in, its continuation out."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from slotmoe.tools.options import generation_options, open_runtime, prompt_text, runtime_options


@click.command(name="run")
@click.argument("model", metavar="MODEL")
@click.argument("prompt")
@generation_options
@runtime_options
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object with the text and all statistics instead of text.",
)
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    chat: bool,
    trace: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with MODEL and stream the text to stdout; statistics go to stderr.

    MODEL is an export (see slotmoe quantize), a Hugging Face checkpoint folder, a hub id like
    deepseek-ai/DeepSeek-V2-Lite, or 'sample'; the last three are quantized once into a cache folder
    ($SLOTMOE_CACHE, default ~/.cache/slotmoe). PROMPT '-' reads the prompt from stdin.

    \b
    Examples:
      slotmoe run sample "It is a truth universally acknowledged, that"
      slotmoe run lite-export --chat --temperature 0.7 --seed 1 "Write a haiku about disks."
      slotmoe run v2-export --ram 16GiB --context 8192 - < prompt.txt
    """
    prompt = prompt_text(prompt)
    with open_runtime(model, options, quiet=as_json) as runtime:
        if trace is not None:
            runtime.trace(trace)
        tokens = []
        try:
            for token in runtime.generate(
                prompt, max_new_tokens, temperature, top_p, top_k, seed, chat
            ):
                tokens.append(token)
                if not as_json:
                    print(token.text, end="", flush=True)
        except KeyboardInterrupt:
            if not as_json:
                print(flush=True)
                print(summary(runtime.stats()), file=sys.stderr)
            raise
        stats = runtime.stats()
        if as_json:
            report = {
                "text": "".join(token.text for token in tokens),
                "ids": [token.id for token in tokens],
            }
            report["logprobs"] = [token.logprob for token in tokens]
            print(json.dumps({**report, **_speeds(stats), **stats}))
        else:
            print(flush=True)
            print(summary(stats), file=sys.stderr)


def _speeds(stats: dict[str, Any]) -> dict[str, float | None]:
    tokens = stats["tokens"]
    return {
        f"{kind}_tokens_per_second": tokens[f"{kind}_tokens"] / tokens[f"{kind}_seconds"]
        if tokens[f"{kind}_tokens"]
        else None
        for kind in ("prefill", "decode")
    }


def summary(stats: dict[str, Any]) -> str:
    """One line: the device and why it was taken, speeds, hits, bytes read and memory, from
    ``Runtime.stats``."""
    from slotmoe.offload.plan.memory import format_size

    lines = [f"on {stats['device']['name']}, {stats['device']['why']}"]
    for kind in ("prefill", "decode"):
        count, seconds = stats["tokens"][f"{kind}_tokens"], stats["tokens"][f"{kind}_seconds"]
        if count:
            lines.append(
                f"{kind} {count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s)"
            )
    cache, disk, memory = stats["cache"], stats["io"]["disk"], stats["memory"]
    if cache["hit_rate"] is not None:
        read = f"{format_size(disk['bytes'])} read from disk"
        if cache["misses"] and "prefetch" in stats:
            read += f", {cache['already_coming'] / cache['misses']:.0%} of the missing ones ahead of the gate"
        lines.append(f"experts {cache['hit_rate']:.1%} hits in {cache['slots']} slots, {read}")
    used = memory["peak_vram"] if memory["tier"] == "vram" else memory["peak_rss"]
    beside = (
        f" and {format_size(memory['beside_vram'])} of the CUDA context and other programs"
        if "beside_vram" in memory
        else ""
    )
    lines.append(
        f"{memory['tier']} peak {format_size(used)} of {format_size(memory['budget'])}{beside}"
    )
    return "[" + "; ".join(lines) + "]"
