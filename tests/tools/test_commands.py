"""The command line: exit codes, one clear line of complaint before any work, what goes to stdout
and what to stderr, a user's own defaults, and what help shows; ``doctor``, within a screen; the
benchmarks of ``python -m bench``, which run here, and whose reports add up."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest

from bench.__main__ import bench
from bench.replay import read_trace
from slotmoe.errors import ConfigError
from slotmoe.quant.export.reader import Export
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.tools import doctor
from slotmoe.tools.cli import main
from tests.support.forkserver import ROOT
from tests.support.tiny import SMALL, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, **SMALL)
    return folder


@pytest.fixture
def run(slotmoe, small_export, checkpoint):
    """Run a line of words, of which EXPORT and CHECKPOINT stand for the least model."""

    def run(line, *arguments):
        places = {"EXPORT": small_export, "CHECKPOINT": checkpoint}
        return slotmoe(*(places.get(word, word) for word in shlex.split(line)), *arguments)

    return run


# A line that is refused, with exit code 2 and nothing on stdout -> what stderr says.
REFUSED = json.loads((ROOT / "tests" / "data" / "refused.json").read_text())


def test_what_is_refused_is_one_line_and_exit_code_2(run, monkeypatch, tmp_path, network):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "moonlight-random").mkdir(parents=True)
    (tmp_path / "cache" / "moonlight-random" / "slotmoe.json").touch()  # as synth makes it
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    for line, wanted in REFUSED.items():
        before = {*tmp_path.rglob("*")}
        code, out, err = run(line)
        assert (code, out) == (2, ""), line
        assert wanted in err and "Traceback" not in err, (line, err)
        # Else click's own: usage, a hint, the error.
        assert err.startswith("Usage: ") or (err.startswith("slotmoe: ") and err.count("\n") == 1)
        assert "EXPORT" in line or {*tmp_path.rglob("*")} == before, line
    assert not Path("dst").exists()


def test_more_memory_than_there_is(run, monkeypatch):
    code, _, err = run("run EXPORT x -n 1 --ram 800TiB")
    assert code == 0 and "--ram 800TiB is more than this machine has" in err
    monkeypatch.setattr("slotmoe.offload.engine.loading.total_memory", lambda: 1 << 10)
    code, _, err = run("run EXPORT x -n 1")
    assert code == 2 and "of RAM and this machine has 1.0 KiB: give a smaller --ram" in err


STATISTICS = r"stopped at 5 tokens \(-n\) · [\d.]+ tokens/s · first token .* GiB\n"


def test_text_goes_to_stdout_and_statistics_to_stderr(run, monkeypatch):
    line = "run EXPORT Hello -n 5"
    code, out, err = run(line)
    assert code == 0 and out.endswith("\n") and re.fullmatch(STATISTICS, err)
    assert run(f"{line} --verbose")[1] == out
    seeded = [run(f"{line} --temperature 2 --seed {seed}")[1] for seed in (1, 1, 2)]
    assert seeded[0] == seeded[1] != seeded[2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello")))
    assert run("run EXPORT -n 5")[1] == out  # the prompt is piped in
    code, json_out, err = run(f"{line} --json")
    report = json.loads(json_out)
    assert (code, err, json_out.count("\n")) == (0, "", 1)
    assert report["text"] + "\n" == out and len(report["ids"]) == len(report["logprobs"])
    monkeypatch.setattr("slotmoe.quant.kernels.cpu.bindings.load", lambda: None)
    code, out, err = run("run EXPORT x -n 3 --context 64")
    assert code == 0 and out and err.count("native kernels were not built") == 1


def test_quantize_reports(run, tmp_path):
    source, first, second = (tmp_path / name for name in ("source", "1", "2"))
    write_checkpoint(source, surprising_key=1, **SMALL)
    code, out, err = run("quantize", source, first)
    assert (code, out) == (0, "")
    assert "surprising_key" in err and f'Run it: slotmoe run {first} "Your prompt"' in err
    code, out, err = run("quantize CHECKPOINT", second, "--json", "--resident", "nf4")
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    files = [path for path in second.rglob("*") if path.is_file() and path.name != "slotmoe.json"]
    assert report["bytes"] == sum(path.stat().st_size for path in files)


BENCH = "--prompt-tokens 20 --decode-tokens 4 --repetitions 2 --context 64 --json".split()
MEASURED = {"prefill_tokens_per_second", "decode_tokens_per_second", "ceiling", "settings"}


@pytest.mark.usefixtures("heavy")
def test_synth_and_bench(slotmoe, tmp_path):
    """A geometry whose sizes fill no tile, layers shared by hard links, and the keys that others
    read."""
    sizes = {"hidden_size": 72, "moe_intermediate_size": 40, "num_hidden_layers": 5}
    write_checkpoint(tmp_path / "source", **sizes)
    made = tmp_path / "random"
    synth = ["synth", tmp_path / "source" / "config.json", made, "--share-layers", 2, "--json"]
    code, out, _ = slotmoe(*synth, "--codec", "nf4", "--resident", "nf4")
    assert code == 0 and json.loads(out)["bytes"] > 0
    files = sorted((made / "experts").iterdir())
    assert len(files) == 4 and len({file.stat().st_ino for file in files}) == 2
    with Export.open(made) as export:
        assert all(weight.isfinite().all() for weight in export.expert(4, 7).values())
    code, out, _ = slotmoe("bench", made, *BENCH)
    report = json.loads(out)
    assert code == 0 and set(report) >= MEASURED
    assert report["cache"]["misses"] == 0  # slots are filled before the clock starts
    assert report["disk"] is None
    report = json.loads(slotmoe("bench", made, *BENCH, "--slots", 8)[1])
    assert report["cache"]["misses"] > 0
    assert set(report["disk"]) == {"bytes_per_second", "bytes_per_token"}
    out = slotmoe("bench", made, *BENCH[:-1], "--slots", 8)[1]
    assert "MB a token from disk" in out


HELP = """
import sys
from slotmoe.tools.cli import cli
heavy = set("torch transformers bitsandbytes numpy tokenizers safetensors matplotlib".split())
for line in ("--help", "run --help", "--version", "doctor", "plan v2-lite"):
    cli.main(line.split(), prog_name="slotmoe", standalone_mode=False)
    assert not heavy & set(sys.modules), line
    assert line.startswith("plan") or "rich" not in sys.modules, line
for line in ("run nowhere x", "chat nowhere", "serve nowhere", "bench nowhere", "profile nowhere",
             "eval nowhere --text setup.py", "verify nowhere", "quantize nowhere dst", "list"):
    try:
        cli.main(line.split(), prog_name="slotmoe", standalone_mode=False)
    except ValueError as problem:
        assert str(problem).startswith("nowhere: "), problem
    else:
        assert line == "list"
    assert not heavy & set(sys.modules), line
"""


@pytest.mark.usefixtures("processes")
def test_help_and_refusals_need_no_torch():
    command = [sys.executable, "-c", HELP]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "slotmoe run sample" in child.stdout and "--max-new-tokens" in child.stdout


def test_defaults_of_a_user(run, slotmoe, monkeypatch):
    """By the environment, and what is typed before that."""
    for name, value in {"CONTEXT": "64", "SEED": "6", "MAX_NEW_TOKENS": "2", "RAM": "3GiB"}.items():
        monkeypatch.setenv(f"SLOTMOE_RUN_{name}", value)
    line = "run EXPORT x --json --temperature 2"
    report = json.loads(run(line)[1])
    assert (report["context"], len(report["ids"])) == (64, 2)
    assert report["memory"]["budget"] == 3 << 30
    assert report["ids"] == json.loads(run(f"{line} --seed 6")[1])["ids"]
    assert json.loads(run(f"{line} --context 32")[1])["context"] == 32
    monkeypatch.setenv("SLOTMOE_RUN_CONTEXT", "x")
    code, out, err = slotmoe("run", "sample", "x")
    assert (code, out) == (2, "") and "'x' is not a valid integer" in err


OFFERED = {
    "run sample x --max": ["--max-new-tokens"],
    "run li": ["library", "lite", "lite-export"],
    "plan v2-": ["v2-lite"],
    "plan v2 --gpu rtx-306": ["rtx-3060"],
    "run sample x --device cu": ["cuda"],
}


def test_what_a_shell_completes(slotmoe, tmp_path, monkeypatch):
    """Commands, options, models and GPUs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    there = "lite-export/slotmoe.json", "lite/config.json", "lint/x"
    for path in map(tmp_path.joinpath, (*there, "cache/library-0123456789ab/slotmoe.json")):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setenv("_SLOTMOE_COMPLETE", "bash_complete")
    for words, offered in OFFERED.items():
        monkeypatch.setenv("COMP_WORDS", f"slotmoe {words}")
        monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
        code, out, err = slotmoe()
        assert (code, err) == (0, "")
        assert sorted(line.partition(",")[2] for line in out.splitlines()) == offered, words


# What doctor finds on this machine and on others
ASKED = cache(doctor.machine.ask_gpu)


@pytest.fixture
def report(processes, slotmoe, monkeypatch):
    """Of ``slotmoe doctor``: exit code, and the checks by name. GPUs are asked once."""
    monkeypatch.setattr(doctor.machine, "ask_gpu", ASKED)

    def run(*arguments):
        code, out, _ = slotmoe("doctor", "--json", *arguments)
        report = json.loads(out)
        assert report["ok"] == (code == 0)
        return code, {check["name"]: check for check in report["checks"]}

    return run


def test_this_machine(report, slotmoe):
    code, checks = report()
    first, rest = "system processor kernels compiler GPU Vulkan RAM pages", "serve chat plots gguf"
    assert " ".join(checks) == f"{first} {rest} cache disk"
    assert (code == 0) == all(check["state"] != "bad" for check in checks.values())
    assert metadata.version("torch") in checks["GPU"]["found"]
    assert len(slotmoe("doctor")[1].splitlines()) < 24  # a screen


def test_missing_kernels(report, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.machine.quant, "__file__", str(tmp_path / "__init__.py"))
    code, checks = report()
    assert (code, checks["kernels"]["state"]) == (1, "bad")
    assert "up to 200 times slower" in checks["kernels"]["found"]
    assert checks["kernels"]["advice"].startswith("install slotmoe again")


def test_cache_and_disk(report, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "file" / "folder"))
    code, checks = report()
    assert (code, checks["cache"]["state"]) == (1, "bad")
    assert checks["cache"]["found"].endswith(f"{tmp_path / 'file'} is no folder")
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("SLOTMOE_CACHE", str(cache / "not" / "yet"))
    assert "slotmoe bench measures its speed" in report()[1]["disk"]["found"]
    assert list(cache.iterdir()) == []


# ``python -m bench``


def benchmark(*arguments):
    """The JSON object of a benchmark's last line."""
    native = bindings.load()
    before = native and native.threads
    printed = io.StringIO()
    try:
        with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(printed):
            main([str(argument) for argument in arguments], group=bench)
    finally:
        if native:
            native.set_threads(before)
    assert not ended.value.code
    return json.loads(printed.getvalue().splitlines()[-1])


def by(key, report):
    return {row[key]: row for row in report["results"]}


BENCHMARKS = {
    "engine": ("with the engine", "--slots", 60, "--decode-tokens", 3),
    "drafts": ("without drafts", "TEXT", "--prompt-tokens", 40, "--decode-tokens", 20),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_ways_are_compared(name, sample_export, tmp_path):
    """Medians lie in their ranges."""
    (tmp_path / "text").write_text("the same words, " * 40)
    against, *options = BENCHMARKS[name]
    options = [tmp_path / "text" if word == "TEXT" else word for word in options]
    rows = by("way", benchmark(name, sample_export, *options, "--repetitions", 1))
    assert rows[against]["ratios"] == [1.0, 1.0]
    for row in rows.values():
        assert 0 < row["range"][0] <= row["range"][1] and row["ratio"] > 0


def test_stages_of_a_token(heavy, sample_export):
    rows = by("stage", benchmark("kernels", sample_export, "--repetitions", 1))
    assert all(rows[stage]["bytes"] > 0 < rows[stage]["ratio"] for stage in ("experts", "head"))


def test_replay(slotmoe, sample_export, tmp_path):
    trace = tmp_path / "trace"
    assert slotmoe("run", sample_export, "Hello", "-n", 8, "--trace", trace)[0] == 0
    report = benchmark("replay", trace, trace, "--slots", 50, "--slots", 224, "--policy", "lru")
    rows = {(row["policy"], row["slots"]): row for row in report["results"]}
    assert report["experts"] == 7 * 32 == 224
    assert 0 < rows["lru", 50]["hit_rate"] < rows["optimum", 50]["hit_rate"] < 1
    assert rows["lru", 224]["of_optimum"] == rows["optimum", 50]["of_optimum"] == 1
    trace.write_bytes(trace.read_bytes()[:-3])
    with pytest.raises(ConfigError, match="is cut off"):
        read_trace(trace)
