"""What many threads ask of one ``Runtime``, each answer beside what a model says alone."""

import json
import random
import sys
import threading
import time
from dataclasses import asdict, dataclass

from slotmoe.errors import CLOSED, ConfigError
from slotmoe.offload.runtime import Runtime

THREADS = 8
SAMPLED = {"temperature": 0.8, "seed": 7}


@dataclass(frozen=True)
class Text:
    """The ids of a prompt, and what a model says alone: greedy tokens and those that are sampled
    with ``SAMPLED``, each as its id, its log-probability and its text."""

    prompt: list[int]
    greedy: list[tuple[int, float, str]]
    sampled: list[tuple[int, float, str]]


def texts_alone(export, prompts, length, **options):
    """The ``Text`` of each prompt, of a model that keeps nothing and computes one at a time."""
    texts = []
    with Runtime.open(export, **options) as runtime:
        for prompt in prompts:
            ids = runtime.encode(prompt) if isinstance(prompt, str) else prompt
            said = []
            for how in ({}, SAMPLED):
                runtime.engine.empty()
                said.append([_parts(token) for token in runtime.generate(ids, length, **how)])
            texts.append(Text(ids, *said))
    return texts


def _parts(token):
    return token.id, token.logprob, token.text


def one_text(runtime, texts, chance):
    """Ask for a text by chance, or for the rest of it behind its beginning, and perhaps leave in
    the middle.  Raises ``AssertionError`` where anything is not as it is alone."""
    text = chance.choice(texts)
    kind = chance.choice(("greedy", "greedy", "goes on", "goes on", "sampled", "scored"))
    wanted = text.sampled if kind == "sampled" else text.greedy
    begun = chance.randrange(len(wanted)) if kind in ("goes on", "scored") else 0
    ids = [*text.prompt, *(id_ for id_, *_ in wanted[:begun])]
    if kind == "scored":
        found = [token.logprob for token in runtime.score(ids)][len(text.prompt) :]
        assert found == [logprob for _, logprob, _ in wanted[:begun]], f"scores of {ids} differ"
        return
    length = chance.randint(1, len(wanted) - begun)
    stream = runtime.generate(ids, length, **SAMPLED if kind == "sampled" else {})
    leaves, wanted = chance.random() < 0.2, [part[:2] for part in wanted[begun : begun + length]]
    found = []
    for token in stream:
        found.append((token.id, token.logprob))
        if leaves and chance.random() < 0.1:
            stream.close()
            wanted = wanted[: len(found)]
            break
    assert found == wanted, f"{kind} behind {ids}: {found}, and alone {wanted}"


def serve_beside(folder):
    """Let the server that this process is about to be have ``THREADS`` threads beside its clients,
    while the file ``go`` is in ``folder``, which has the ``texts``.  ``done`` grows by a byte a
    text; what is wrong goes to stderr."""
    from slotmoe.tools import serve

    make = serve.make_server
    texts = read_texts(folder)

    def work(runtime, chance):
        while True:
            if not (folder / "go").exists():
                time.sleep(0.1)
                continue
            try:
                one_text(runtime, texts, chance)
            except ConfigError as problem:
                if str(problem) != CLOSED:
                    raise
                return
            except BaseException as problem:
                print(f"beside: {problem!r}", file=sys.stderr)
            with (folder / "done").open("ab") as done:
                done.write(b".")

    def make_server(runtime, *given):
        for number in range(THREADS):
            given_to = runtime, random.Random(number)
            threading.Thread(target=work, args=given_to, daemon=True).start()
        return make(runtime, *given)

    serve.make_server = make_server


def write_texts(folder, texts):
    (folder / "texts").write_text(json.dumps([asdict(text) for text in texts]))


def read_texts(folder):
    texts = [Text(**text) for text in json.loads((folder / "texts").read_text())]
    for text in texts:
        for said in (text.greedy, text.sampled):
            said[:] = map(tuple, said)
    return texts
