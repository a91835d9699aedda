"""``slotmoe run``: a prompt in, its continuation out."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from slotmoe.offload.plan.memory import format_size
from slotmoe.tools.options import (
    JSON,
    generation_arguments,
    generation_options,
    open_runtime,
    prompt_text,
    runtime_options,
)


@click.command(name="run")
@click.argument("model", metavar="MODEL")
@click.argument("prompt")
@generation_options
@runtime_options
@JSON
def command(model: str, prompt: str, trace: Path | None, as_json: bool, **options: Any) -> None:
    """Continue PROMPT with MODEL and stream the text to stdout; statistics go to stderr.

    MODEL is an export (see slotmoe quantize), a Hugging Face checkpoint folder, a GGUF file, a hub
    id like deepseek-ai/DeepSeek-V2-Lite, or 'sample'; the last four are quantized once into a cache
    folder ($SLOTMOE_CACHE, default ~/.cache/slotmoe). PROMPT '-' reads the prompt from stdin.

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
        tokens, stopped = [], None
        try:
            for token in runtime.generate(prompt, **generation_arguments(options)):
                tokens.append(token)
                if not as_json:
                    print(token.text, end="", flush=True)
        except KeyboardInterrupt as stop:
            stopped = stop
        stats = runtime.stats()
    if not as_json:
        print(flush=True)
        print(summary(stats), file=sys.stderr)
    if stopped is not None:
        raise stopped
    if as_json:
        report: dict[str, Any] = {"text": "".join(token.text for token in tokens)}
        report["ids"] = [token.id for token in tokens]
        report["logprobs"] = [token.logprob for token in tokens]
        print(json.dumps({**report, **speeds(stats), **stats}))


def speeds(stats: dict[str, Any]) -> dict[str, float | None]:
    tokens, speeds = stats["tokens"], dict[str, float | None]()
    for kind in ("prefill", "decode"):
        count = tokens[f"{kind}_tokens"]
        speeds[f"{kind}_tokens_per_second"] = count / tokens[f"{kind}_seconds"] if count else None
    return speeds


def summary(stats: dict[str, Any]) -> str:
    """One line for a person about what ``Runtime.stats`` gives."""
    facts = [f"on {stats['device']['name']}, {stats['device']['why']}"]
    for kind, speed in zip(("prefill", "decode"), speeds(stats).values(), strict=True):
        if speed is not None:
            count, seconds = stats["tokens"][f"{kind}_tokens"], stats["tokens"][f"{kind}_seconds"]
            facts.append(f"{kind} {count} tokens in {seconds:.2f} s ({speed:.1f} tokens/s)")
    cache, disk, memory = stats["cache"], stats["io"]["disk"], stats["memory"]
    if cache["hit_rate"] is not None:
        read = f"{format_size(disk['bytes'])} read from disk"
        if cache["misses"] and "prefetch" in stats:
            ahead = cache["already_coming"] / cache["misses"]
            read += f", {ahead:.0%} of the missing ones ahead of the gate"
        facts.append(f"experts {cache['hit_rate']:.1%} hits in {cache['slots']} slots, {read}")
    peak = memory["peak_vram" if memory["tier"] == "vram" else "peak_rss"]
    used = f"{memory['tier']} peak {format_size(peak)} of {format_size(memory['budget'])}"
    if "beside_vram" in memory:
        beside = format_size(memory["beside_vram"])
        used += f" and {beside} of the CUDA context and other programs"
    return f"[{'; '.join([*facts, used])}]"
