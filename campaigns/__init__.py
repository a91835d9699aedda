"""Campaigns: attacks that take minutes to hours.  What must hold at each change is a test of
``tests/``; a campaign looks for what no test has thought of.

This module is the registry.  ``python -m campaigns --help`` says how to run them.
"""

from typing import NamedTuple


class Campaign(NamedTuple):
    """What happens and what must come of it, and what ``came_out`` in all runs so far."""

    name: str
    about: str
    came_out: str


CAMPAIGNS = (
    Campaign(
        "system-calls",
        "Each system call of a command fails in turn: one line names the file, no wrong byte gets a"
        " final name, the same command then makes the same bytes.",
        "3,725 points",
    ),
    Campaign(
        "fuzz",
        "Parsers of strangers' bytes get changed inputs, a model weights that say anything: nothing"
        " but errors of one line, within 2 s of CPU and 200 MB.",
        "15 million cases",
    ),
    Campaign(
        "interrupts",
        "Ctrl-C and SIGTERM at any moment of each command: no hang, no traceback, the beginning of"
        " the right text, and afterwards the same again.",
        "830 signals",
    ),
    Campaign(
        "kills",
        "SIGKILL and power cuts while a model is quantized or a session is saved: the same bytes"
        " afterwards.",
        "5,053 kills, 157 power cuts",
    ),
    Campaign(
        "races",
        "Two or three processes at one destination, cache or session, some signalled:"
        " success or a refusal, nothing wrong on the disk.",
        "3,937 rounds",
    ),
    Campaign(
        "environments",
        "8 commands in 26 worlds, without a home, streams, descriptors or memory: an exit code of"
        " the contract, and one line.",
        "208 commands; 4 were wrong and are mended",
    ),
    Campaign(
        "escapes",
        "Escape codes, forged lines and markup in every string that strangers write: none on a"
        " terminal, in the log or in an answer.",
        "1,939 commands and requests",
    ),
    Campaign(
        "soak",
        "Tokens under random budgets, policies, sessions, Ctrl-C, errors and bad reads, also beside"
        " threads: the same bits, nothing left open, memory +5% at most.",
        "27,062 tokens; memory +0.3%",
    ),
    Campaign(
        "server",
        "A hundred clients ask, leave, send half requests and nonsense for half an hour: answers as"
        " of a model alone, nothing left open, memory +2% at most. Fields that cost much hold the"
        " event loop 50 ms at most, and 1 s is computed for a client that left.",
        "264,278 requests; memory +1.4%; 60,000 such fields, 34 ms, once 85; 0.95 s",
    ),
    Campaign(
        "clients",
        "Client programs of others use the server, each in an environment of its own.",
        "all cases pass",
    ),
    Campaign(
        "templates",
        "Some hundred models' chat templates write conversations, beside transformers: no character"
        " differs, and the same are refused.",
        "178 templates, 2,136 conversations",
    ),
    Campaign(
        "many-machines",
        "Ray Serve and LiteLLM before two replicas, of which one is killed in an answer: sessions"
        " stick, and go on at the other.",
        "both parts pass",
    ),
    Campaign(
        "wine",
        "A Windows Python under Wine passes the ordinary tests and makes Linux's bytes.",
        "not run in this form; a longer one passed on 2026-11-29",
    ),
)


def table() -> list[str]:
    """The lines of a Markdown table of all campaigns."""
    lines = ["| campaign | what happens, and what must come of it | so far |", "|---|---|---|"]
    lines += [f"| `{it.name}` | {it.about} | {it.came_out} |" for it in CAMPAIGNS]
    return lines
