"""What clients leave unsent or ask for too much of costs a server bounded memory, and no exit."""

import asyncio
import json
import select
import tracemalloc
from contextlib import ExitStack, suppress
from operator import sub

import pytest

from slotmoe.tools.serve import guard as serve_guard
from slotmoe.tools.serve.answers import Answers, Scores
from tests.support.forkserver import COMMAND_LINE
from tests.support.served import GREEDY, connect, request, start, until

TEXT = "/v1/completions"


def test_bodies_that_lack_their_end_share_a_bounded_room(served, monkeypatch):
    """Of 8 of the largest; beyond it clients are told, small ones are served.  A room that was more
    than half full is given back."""
    body, given = b" " * ((1 << 20) - 9), []
    monkeypatch.setattr(serve_guard, "give_back_memory", lambda: given.append(1))
    with ExitStack() as stack:
        links = [stack.enter_context(connect(served.port)) for _ in range(20)]
        for link in links:
            with suppress(OSError):  # refused before its end
                link.sendall(request(body)[:-1])
        until(lambda: len(select.select(links, [], [], 0)[0]) >= 12 - 1)
        told = select.select(links, [], [], 0)[0]
        before = len(given)  # of another test's clients, which left just now
        assert {link.recv(12) for link in told} == {b"HTTP/1.1 429"}
        assert served.complete("Call me", max_tokens=1) and len(given) == before
    until(lambda: served.ask("POST", TEXT, b'"' + body)[0] == 400)
    until(lambda: len(given) > before)


def test_log_probabilities_are_kept_compact(runtime):
    """20 of them beside a token; as objects of Python they took three times that."""
    tokens = runtime.generate("Call me", 200, top_logprobs=20)
    first = next(tokens)
    tracemalloc.start()
    rest = [*tokens]
    kept = tracemalloc.get_traced_memory()[0] / len(rest)
    tracemalloc.stop()
    assert kept < 1500 and len(first.likeliest) == 20
    assert first.likeliest[0] == (first.id, first.logprob)


@pytest.mark.parametrize("count", [0, 1, 64, 1000])
def test_they_become_json_some_at_a_time(count):
    made = []
    scores = Scores(lambda number: made.append(number) or {"a": number}, range(count))

    async def read():
        response = Answers.respond({"x": [scores, "\u00e9"], "y": scores})
        return [(piece, len(made)) async for piece in response.body_iterator]

    pieces, numbers = zip(*asyncio.run(read()), strict=True)
    rows = [{"a": number} for number in range(count)]
    assert json.loads("".join(pieces)) == {"x": [rows, "\u00e9"], "y": rows}
    assert max(map(sub, numbers, (0, *numbers))) <= 64 and len(made) == 2 * count


@pytest.mark.usefixtures("processes")
def test_a_signal_ends_a_server_whose_thread_hangs(sample_export):
    hanging = f"""
import sys, threading
import slotmoe.tools.serve as serve
from slotmoe.tools.serve.service import Service
serve._GRACE_SECONDS = serve._LAST_SECONDS = 0.1
Service.encode = lambda *_: print("came", file=sys.stderr) or threading.Event().wait()
{COMMAND_LINE}"""
    child, port = start(sample_export, program=hanging)
    with child, connect(port, request(json.dumps({**GREEDY, "prompt": "x"}).encode())):
        assert child.stderr.readline() == "came\n"
        child.terminate()
        assert child.wait() == 143
