"""What each test costs, and on what: ``python -m pytest -p tests.support.durations --costs FILE``
writes a table by kind and by file.

A fixture that several tests share counts for the first of them.  Kinds overlap: an engine may run
interpreted kernels.
"""

import os
import subprocess
import time
from collections import defaultdict
from functools import wraps

import pytest

from tests.support.forkserver import Forked

COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++")
KINDS = {
    "process": "waits for a process, and its start",
    "compile": "a compiler",
    "engine": "opens an engine",
    "quantize": "quantizes a checkpoint",
    "interpreter": "Triton's interpreter",
    "oracle": "transformers",
}
_seconds, _counts = defaultdict(float), defaultdict(int)
_depth = defaultdict(int)


def measured(kind, function, counts=True):
    """``function``, whose seconds belong to ``kind``: a name, or what the arguments make of it."""

    @wraps(function)
    def call(*arguments, **options):
        name = kind(*arguments) if callable(kind) else kind
        _counts[name] += counts and not _depth[name]
        _depth[name] += 1
        begin = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            _depth[name] -= 1
            if not _depth[name]:
                _seconds[name] += time.perf_counter() - begin

    return call


def of_process(process, arguments=None, *_, **__):
    arguments = process.args if arguments is None else arguments
    words = [arguments] if isinstance(arguments, str | bytes | os.PathLike) else list(arguments)
    compiles = os.path.basename(str(words[0])) in COMPILERS or "build_ext" in words
    return "compile" if compiles else "process"


def pytest_addoption(parser):
    parser.addoption("--costs", help="a file for the table of what tests cost")


def pytest_configure(config):
    if not config.getoption("--costs"):
        return
    from slotmoe.offload.ingest import quantize
    from slotmoe.offload.runtime import Runtime
    from tests.support import oracle

    Popen = subprocess.Popen
    Popen.__init__ = measured(of_process, Popen.__init__)
    for name in ("wait", "communicate"):
        waits = getattr(Popen, name)
        setattr(Popen, name, measured(lambda process, *_: of_process(process), waits, counts=False))
    os.fork = measured("process", os.fork)
    Runtime.open = measured("engine", Runtime.open)
    quantize._Job.run = measured("quantize", quantize._Job.run)
    for name in ("transformers_network", "transformers_logits"):
        setattr(oracle, name, measured("oracle", getattr(oracle, name)))
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    GridExecutor.__call__ = measured("interpreter", GridExecutor.__call__)


def cpu_seconds():
    times = os.times()
    children = times.children_user + times.children_system + Forked.cpu_seconds
    return times.user + times.system + children


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if not item.config.getoption("--costs"):
        return (yield)
    _seconds.clear()
    _counts.clear()
    item.begin = time.perf_counter(), cpu_seconds()
    return (yield)


@pytest.hookimpl(tryfirst=True)  # before the report is made of the item
def pytest_runtest_makereport(item, call):
    if hasattr(item, "begin") and call.when == "teardown":
        wall, cpu = item.begin
        costs = dict(_seconds), dict(_counts)
        item.user_properties.append(
            ("costs", (time.perf_counter() - wall, cpu_seconds() - cpu, *costs))
        )


_costs = {}


def pytest_runtest_logreport(report):
    if report.when == "teardown" and (costs := dict(report.user_properties).get("costs")):
        _costs[report.nodeid] = costs


def rows(title, costs_of):
    yield f"| {title} | tests | seconds | CPU seconds | " + " | ".join(KINDS) + " |"
    yield "|---" * (4 + len(KINDS)) + "|"
    for name, costs in sorted(costs_of.items(), key=lambda item: -sum(c[0] for c in item[1])):
        wall, cpu = sum(c[0] for c in costs), sum(c[1] for c in costs)
        kinds = [
            f"{sum(c[2].get(kind, 0) for c in costs):.1f} ({sum(c[3].get(kind, 0) for c in costs)})"
            for kind in KINDS
        ]
        yield f"| {name} | {len(costs)} | {wall:.1f} | {cpu:.1f} | " + " | ".join(kinds) + " |"


def pytest_sessionfinish(session):
    path = session.config.getoption("--costs")
    if not path or hasattr(session.config, "workerinput"):
        return
    files, folders = defaultdict(list), defaultdict(list)
    for nodeid, costs in _costs.items():
        file = nodeid.partition("::")[0]
        files[file].append(costs)
        folders["all"].append(costs)
        folders[os.path.dirname(file)].append(costs)
    slow = dict(sorted(_costs.items(), key=lambda item: -item[1][0])[:60])
    with open(path, "w") as out:
        print("Seconds by kind, and how often in brackets:\n", file=out)
        for kind, what in KINDS.items():
            print(f"- {kind}: {what}", file=out)
        tables = ("folder", folders), ("file", files), ("test", {k: [v] for k, v in slow.items()})
        for table in tables:
            print("", *rows(*table), sep="\n", file=out)
