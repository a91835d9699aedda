"""Campaigns: attacks that take minutes to hours.  What must hold at each change is a test of
``tests/``; a campaign looks for what no test has thought of.

This module is the registry.  ``python -m campaigns --help`` says how to run them.
"""

from typing import NamedTuple


class Gate(NamedTuple):
    """What is attacked, what a run ``must`` reach, and what ``came_out`` of the last full one.  A
    campaign has no ``command`` of its own: ``python -m campaigns NAME`` reaches the gate."""

    name: str
    about: str
    must: str
    came_out: str
    command: str = ""


CAMPAIGNS = (
    Gate(
        "system-calls",
        "Each system call of a command fails in turn: bad disk, full disk, signal, short, killed.",
        "100% of points: a failure is one line that names the file, no wrong byte under a final"
        " name, the same command then makes the same bytes",
        "3,490 points and 38 of `fsync` alone, nothing wrong (325f334)",
    ),
    Gate(
        "fuzz",
        "Each parser of a stranger's bytes gets changed inputs, and tokenizers numbers at their"
        " limits, within 2 s of CPU and 200 MB.",
        "10⁶ cases a parser, nothing but errors of one line",
        "15,081,017 cases; 13 of 22 parsers have had 10⁶ (2026-11-28)",
    ),
    Gate(
        "flips",
        "A bit of an export or of a session flips, its end is cut, or two parts are exchanged.",
        "10⁶ cases, none missed",
        "1,170,000, none missed (e450e24)",
    ),
    Gate(
        "resume",
        "A file of a `quantize` that was stopped changes, at each stage; signed ones also forged.",
        "3,000 cases each: the same bytes, or a line whose advice makes them; no raw error",
        "",
    ),
    Gate(
        "interrupts",
        "Ctrl-C and SIGTERM over the life of each command, and in Python, also beside threads.",
        "500 each: no hang, no traceback, a line, the beginning of the right text, the same again",
        "164 over six commands' lives, 40 of `serve`, 400 of Python, nothing wrong (2026-11-28)",
    ),
    Gate(
        "kills",
        "SIGKILL, then power cuts, while a model is quantized or a session is saved.",
        "2,000 kills each, a power cut at each change of the disk; the same bytes afterwards",
        "2,000 and 2,012 kills, 31 and 27 power cuts, same bytes (e450e24)",
    ),
    Gate(
        "races",
        "Two or three processes, or eight threads in each, at one destination, cache or"
        " session; some get signals.",
        "1,000 rounds each: success or a refusal, nothing wrong on the disk",
        "2,500 rounds in all (d443fb2), and 40 of threads (0e14cc1), nothing wrong",
    ),
    Gate(
        "environments",
        "Each command without a home, streams, descriptors, memory or text; with strange names.",
        "26 worlds x 8 commands: an exit code of the contract, and one line where it is not 0",
        "208, of which 4 were wrong and are mended (e450e24)",
    ),
    Gate(
        "escapes",
        "Escape codes, forged lines and markup in every string that strangers write.",
        "each string of each input: no such character on stdout, stderr, in the log or an answer",
        "994 commands and requests, 60 strings of each file, nothing wrong (2026-11-28)",
    ),
    Gate(
        "soak",
        "Tokens under random budgets, policies, sessions, Ctrl-C, errors and bad reads.",
        "20,000 tokens, all with the same bits; descriptors and threads as before, memory +5%",
        "20,014 tokens, all right; memory +0.3% (4e88b6e)",
    ),
    Gate(
        "server",
        "A hundred clients of a server with sessions ask, leave, send half requests and nonsense;"
        " eight threads of its process generate.",
        "30 minutes, answers as of a model alone; descriptors as before, memory +2%",
        "twice, 250,093 requests, 25,657 compared answers, all right; memory +1.0% (0e14cc1)",
    ),
    Gate(
        "clients",
        "Client programs of others use the server, each in an environment of its own.",
        "6 programs, all cases pass",
        "all pass (2026-11-28)",
    ),
    Gate(
        "templates",
        "Chat templates of some hundred models write conversations, beside transformers.",
        "no character differs, and the same are refused",
        "178 templates, 2,136 conversations, no difference (2026-11-28)",
    ),
    Gate(
        "many-machines",
        "Ray Serve and LiteLLM in front of two replicas, of which one is killed in an answer.",
        "sessions stick, and go on at the other, computing nothing again; queues add replicas",
        "both parts, nothing wrong (2026-11-28)",
    ),
    Gate(
        "wine",
        "A Windows Python under Wine that has this tree's wheel passes the ordinary tests, and"
        " makes exports, texts, logits and sessions.",
        "no failure, and Linux's bytes",
        "this form of it has not run; the one before passed in each part (2026-11-29)",
    ),
)
# Reached by long tests, each night.
TESTS = (
    Gate(
        "state of a resume",
        "The state file of a `quantize` that was stopped is changed.",
        "1,000 changes, no value trusted, same bytes",
        "1,000, same bytes (f55e85e)",
        'python -m pytest -m "slow or not slow" tests/offload/test_quantize.py -k trusted',
    ),
    Gate(
        "order of events",
        "Cache, slots and prefetcher beside a model of them in plain Python.",
        "1,000 x 200 steps",
        "1,000 x 200, nothing found (43210ec)",
        'python -m pytest -m "slow or not slow" tests/offload/test_states.py',
    ),
    Gate(
        "reproducible kernels",
        "The kernels are built in folders of three names.",
        "the same bytes",
        "the same SHA-256 (337d3aa)",
        'python -m pytest -m "slow or not slow" tests/test_project.py',
    ),
    Gate(
        "mutants",
        "cosmic-ray changes a file in one place; the quick tests of its package must notice.",
        "90% of 50 each in engine, store, sessions, codecs and plan",
        "41 of 53 of a sample killed, by the tester before it (2026-11-28)",
        "python scripts/mutants.py offload/experts/store.py",
    ),
    Gate(
        "known advisories",
        "pip-audit looks up the releases of `requirements.lock`, and torch's.",
        "all looked up, none known",
        "none of the 120 in pypa/advisory-database up to 2024-10-10 (2026-11-28)",
        "python scripts/audit.py",
    ),
    Gate(
        "lowest versions",
        "The tests with Python 3.10 and all lower bounds of dependencies.",
        "all pass",
        "720 pass, 2 need clients' libraries (48f56e6)",
        "PYTHON=python3.10 scripts/lowest",
    ),
)


def table() -> list[str]:
    """The lines of a Markdown table of all gates."""
    lines = ["| gate | what happens | must | came out | command |", "|---|---|---|---|---|"]
    for gate in (*CAMPAIGNS, *TESTS):
        command = gate.command or f"python -m campaigns {gate.name}"
        cells = (gate.name, gate.about, gate.must, gate.came_out, f"`{command}`")
        lines.append(f"| {' | '.join(cells)} |")
    return lines
