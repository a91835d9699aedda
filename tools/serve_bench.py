"""Speed of ``slotmoe serve``: ``python -m tools.serve_bench EXPORT [--ram SIZE]``.

Tokens a second of 1, 4 and 8 clients that stream at once, counted while all of them decode, and the time to the first token
of a long prompt, cold and with its prefix cached.  The server is a process of its own.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click


def stream(port: int, prompt: list[int], tokens: int, ends: list[int]) -> list[float]:
    """The moments at which the tokens of an answer arrived; the first entry is when it was asked for.

    ``ends`` are never chosen, since random weights may say at once that the answer is over.
    """
    connection, moments = http.client.HTTPConnection("127.0.0.1", port, timeout=600), [time.perf_counter()]
    body = {"model": "bench", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    body["logit_bias"] = {str(one): -100 for one in ends}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    while line := response.readline():
        if line.startswith(b"data: {"):
            moments.append(time.perf_counter())
    connection.close()
    return moments


def together(port: int, clients: int, tokens: int, vocabulary: int, ends: list[int]) -> dict[str, Any]:
    """Tokens a second of all ``clients``, between the last one's first token and the first one's last."""
    source = random.Random(clients)
    prompts = [[source.randrange(10, vocabulary) for _ in range(16)] for _ in range(clients)]
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(lambda prompt: stream(port, prompt, tokens, ends), prompts))
    start, end = max(one[1] for one in found), min(one[-1] for one in found)
    count = sum(start < moment <= end for one in found for moment in one)
    return {"clients": clients, "tokens_per_second": count / (end - start), "counted": count, "first_token_seconds": start - found[0][0]}


@click.command()
@click.argument("export")
@click.option("--ram", metavar="SIZE")
@click.option("--context", type=int, default=4096, show_default=True)
@click.option("--tokens", type=int, default=64, show_default=True, help="Tokens of each answer.")
@click.option("--long", "length", type=int, default=2000, show_default=True, help="Tokens of the long prompt; 0 leaves it out.")
@click.option("--clients", default="1,4,8", show_default=True)
def main(export: str, ram: str | None, context: int, tokens: int, length: int, clients: str) -> None:
    """Measure the server on EXPORT and print one JSON object."""
    from model.config import read_config
    from model.tokenizer import Tokenizer
    from offload.runtime import resolve_model

    folder, most = resolve_model(export), max(int(one) for one in clients.split(","))
    vocabulary = Tokenizer(folder, None).size
    ends = [one for one in read_config(folder / "config.json").eos_token_ids if one < vocabulary]
    command = [sys.executable, "-m", "tools.cli", "serve", export, "--port", "0", "--name", "bench", "--context", str(context)]
    command += ["--max-sequences", str(most), *(["--ram", ram] if ram else [])]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        line = server.stderr.readline()
        match = re.search(r":(\d+),", line)
        assert match, line
        port = int(match[1])
        together(port, 1, tokens, vocabulary, ends)  # brings experts and pages
        found: dict[str, Any] = {"decode": [together(port, int(one), tokens, vocabulary, ends) for one in clients.split(",")]}
        if length:
            prompt = [random.Random(7).randrange(10, vocabulary) for _ in range(length)]
            cold, cached = (stream(port, prompt, 2, ends) for _ in range(2))
            found["first_token_seconds"] = {"cold": cold[1] - cold[0], "cached": cached[1] - cached[0]}
    finally:
        server.terminate()
        server.wait()
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
