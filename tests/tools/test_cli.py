"""The command line: exit codes, one clear line of complaint, and what goes to stdout and what to
stderr."""

import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from slotmoe import system
from slotmoe.model.network import Network
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.export.layout import PROJECTIONS
from slotmoe.quant.export.reader import Export
from slotmoe.quant.weights import dequantize
from slotmoe.tools import cli
from slotmoe.tools.tables import table
from tests.support.forkserver import PIPE, ROOT, Forked, OnTerminal
from tests.support.tiny import SMALL, write_checkpoint

PROMPT = "It is a truth universally acknowledged, that"


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


BAD_USE = {
    "run nowhere x": "nowhere: no such folder",
    "run tests x": "config.json",
    "run EXPORT": "PROMPT",
    "run EXPORT x --fast": "--fast",
    "run EXPORT x --device tpu": "tpu",
    "run EXPORT x --ram lots": "'lots' is not a size",
    "run EXPORT x --ram -1GiB": "'-1GiB' is not a size",
    "run EXPORT x --ram 0": "'0' is not a possible size",
    f"run EXPORT x --ram {'9' * 400}GiB": "is not a size",
    "run EXPORT x --ram 3": "'3' is 3 bytes; write the unit",
    "run EXPORT x --ram 1KiB": "needs at least",
    "run EXPORT x --device cpu --misses fetch": "misses fetch",
    "run EXPORT x --device cpu --vram 1GiB": "--vram",
    "run EXPORT x --temperature nan": "temperature is nan",
    "run EXPORT x --top-p 1.5": "1.5 is not in the range 0<x<=1",
    "run EXPORT x --top-k -3": "-3 is not in the range x>=0",
    f"run EXPORT x --seed {1 << 80}": "is not in the range",
    "run EXPORT x -n 0": "0 is not in the range x>=1",
    "run EXPORT x --threads 300": "expected 1 to 256",
    "run EXPORT x --file setup.py": "both given",
    "run EXPORT --file nowhere": "nowhere",
    "rnu EXPORT x": "did you mean run?",
    "run EXPORT x --temprature 1": "'--temperature'",
    "run samplee x": "did you mean sample?",
    "run v2-lite x": "is a geometry, without weights",
    "run EXPORT x --context 0": "context 0",
    "run EXPORT x --context 257": "max_position_embeddings",
    "run EXPORT 'one two three four five' --context 3": "the context holds 3",
    "run EXPORT caf\udce9": "UTF-8",
    "run EXPORT x --slots 1": "at least 2",
    "run EXPORT x --trace nowhere/trace": "nowhere/trace",
    "quantize EXPORT dst": "is an export already",
    "quantize CHECKPOINT CHECKPOINT --overwrite": "not an export",
    "quantize CHECKPOINT EXPORT --resident nf4": "--overwrite",
    "quantize CHECKPOINT dst --workers 0": "workers",
    "quantize CHECKPOINT nowhere/dst": "nowhere/dst",
    "bench EXPORT --depth 60 --decode-tokens 9 --context 64": "context",
    "synth v3 dst --share-layers 0": "--share-layers",
}


def test_bad_use_is_one_line_and_exit_code_2(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line, wanted in BAD_USE.items():
        code, out, err = run(line)
        assert (code, out) == (2, ""), line
        assert wanted in err and "Traceback" not in err, line
        if err.startswith("slotmoe: "):
            assert err.count("\n") == 1
        else:  # click's own: usage, a hint, the error
            assert err.startswith("Usage: ")
    assert not Path("dst").exists()


BEFORE = [
    *("run CHECKPOINT x --top-p 5", "run CHECKPOINT x -n -3", "run CHECKPOINT x --temperature -1"),
    *("run CHECKPOINT x --ram 10MiB", "chat CHECKPOINT --context 257", "serve CHECKPOINT --vram 1"),
    *("run CHECKPOINT x --slots 1", "chat CHECKPOINT --threads 300", "run CHECKPOINT x --seed -1"),
    *("bench CHECKPOINT --prompt-tokens 5000", "bench CHECKPOINT --depth 60 --context 64"),
    *("eval CHECKPOINT --text nowhere", "run CHECKPOINT x --trace nowhere/trace"),
    *("run CHECKPOINT x --session-limit lots", "run CHECKPOINT x --misses cpu --device cpu"),
    *("run CHECKPOINT x --draft mtp", "profile CHECKPOINT --ram 10MiB"),
    "serve CHECKPOINT --ram 1MiB --max-sequences 256 --port 0",
]


def test_what_config_and_machine_tell_is_said_before_anything_is_quantized(
    run, tmp_path, monkeypatch, network
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    for line in BEFORE:
        code, out, err = run(line)
        assert (code, out) == (2, "") and "Traceback" not in err, line
        assert not (tmp_path / "cache").exists(), line


def test_more_memory_than_there_is(run, monkeypatch):
    code, _, err = run("run EXPORT x -n 1 --ram 800TiB")
    assert (code, err.count("\n")) == (0, 2)
    assert "--ram 800TiB is more than this machine has" in err
    assert "more than" not in run("run EXPORT x -n 1 --ram 4GiB")[2]
    monkeypatch.setattr("slotmoe.offload.engine.loading.total_memory", lambda: 1 << 10)
    code, _, err = run("run EXPORT x -n 1")
    assert (code, err.count("\n")) == (2, 1)
    assert "of RAM and this machine has 1.0 KiB: give a smaller --ram" in err


STATISTICS = (
    r"stopped at 5 tokens \(-n\) · [\d.]+ tokens/s · first token \d+\.\d s"
    r" · \d+\.\d( MiB)? of \d+\.\d GiB\n"
)


def test_text_goes_to_stdout_and_statistics_to_stderr(run):
    line = "run EXPORT Hello -n 5"
    code, out, err = run(line)
    assert code == 0 and out.endswith("\n") and re.fullmatch(STATISTICS, err)
    assert run(f"{line} --verbose")[1] == out
    first, again, other = (run(f"{line} --temperature 2 --seed {seed}")[1] for seed in (1, 1, 2))
    assert first == again != other
    code, json_out, err = run(f"{line} --json")
    report = json.loads(json_out)
    assert (code, err, json_out.count("\n")) == (0, "", 1)
    assert report["text"] + "\n" == out
    assert len(report["ids"]) == len(report["logprobs"]) <= 5


def test_quantize_reports(run, tmp_path):
    source, one, two = (tmp_path / name for name in ("source", "1", "2"))
    write_checkpoint(source, surprising_key=1, **SMALL)
    code, out, err = run("quantize", source, one)
    assert (code, out) == (0, "")
    *told, outcome, advice = err.splitlines()
    assert "surprising_key" in "".join(told)
    assert re.fullmatch(rf"{one}: .* in .* s \(.*\), \d+\.\d\d bits a weight", outcome)
    assert advice == f'Run it: slotmoe run {one} "Your prompt"'
    code, out, err = run("quantize CHECKPOINT", two, "--json", "--resident", "nf4")
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    files = [path for path in two.rglob("*") if path.is_file() and path.name != "slotmoe.json"]
    assert report["bytes"] == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("options", ["", "--json"])
def test_interrupted_generation(options, run, monkeypatch):
    """Ctrl-C after three tokens, in the middle of the fourth."""
    original, calls = Network.forward, []

    def forward(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            time.sleep(0.5)  # the main thread takes what there is, then hears of the signal
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Network, "forward", forward)
    code, out, err = run(f"run EXPORT Hello {options}")
    assert code == 130 and "interrupted" in err and "Traceback" not in err
    assert ("3 tokens · " in err) == (out != "") == (not options)


HELP = """
import sys
from slotmoe.tools.cli import cli
heavy = set("torch transformers bitsandbytes numpy tokenizers safetensors matplotlib".split())
for line in ("--help", "run --help", "--version", "doctor", "list", "plan v2-lite"):
    cli.main(line.split(), prog_name="slotmoe", standalone_mode=False)
    assert not heavy & set(sys.modules), line
    assert line.startswith("plan") or "rich" not in sys.modules, line
for line in ("run nowhere x", "chat nowhere", "serve nowhere", "bench nowhere", "profile nowhere",
             "eval nowhere --text setup.py", "verify nowhere", "quantize nowhere dst"):
    try:
        cli.main(line.split(), prog_name="slotmoe", standalone_mode=False)
    except ValueError as problem:
        assert str(problem).startswith("nowhere: "), problem
    else:
        raise SystemExit(line)
    assert not heavy & set(sys.modules), line
"""


@pytest.mark.usefixtures("processes")
def test_help_needs_no_torch():
    command = [sys.executable, "-c", HELP]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "slotmoe run sample" in child.stdout and "--max-new-tokens" in child.stdout


def test_a_table_that_does_not_fit_is_a_list(monkeypatch):
    columns, row = ["codec", "bits\na weight", "tokens/s"], ["lut, of three kinds", "4.25", "11.5"]
    for width, expected in ((80, 1), (34, 3)):
        monkeypatch.setenv("COLUMNS", str(width))
        console = Console(file=io.StringIO())
        console.print(table(columns, [row], "What codes cost in this case"))
        out = console.file.getvalue()
        assert all(cell in out for cell in row) and "…" not in out
        assert sum(any(cell in line for cell in row) for line in out.splitlines()) == expected


@pytest.mark.usefixtures("processes")
def test_forty_columns(checkpoint, tmp_path):
    """No line is longer but for examples, bars are shares, and a remark has a line of its own."""
    options = {"COLUMNS": "40", "SLOTMOE_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "slotmoe", "run", "--help-all"]
    out = subprocess.run(command, cwd=ROOT, env=os.environ | options, capture_output=True).stdout
    lines = [line for line in out.decode().splitlines() if not line.startswith("    slotmoe ")]
    assert max(map(len, lines)) <= 40
    with OnTerminal("run", checkpoint, "x", "-n", 2, **options) as terminal:
        shown = terminal.rest()
    assert "\x1b[2Kslotmoe: " in shown and "100%" in shown and "━" not in shown


@pytest.mark.usefixtures("processes")
def test_interrupted_command_exits_130(sample_export):
    options = "-n 800 --temperature 1 --seed 5 --threads 1".split()
    with Forked("run", sample_export, "-", *options, stdin=PIPE) as child:
        with child.stdin:
            child.stdin.write(PROMPT.encode())
        assert len(child.stdout.read(200)) == 200
        child.send_signal(signal.SIGINT)
        err = child.communicate()[1].decode()
    assert child.returncode == 130, err
    assert "interrupted" in err and "tokens/s · first token" in err and "Traceback" not in err


@pytest.mark.usefixtures("processes")
def test_an_interrupt_while_libraries_are_loaded_is_one_line(small_export):
    """In a process of its own: torch is on its way when the signal comes."""
    command = [sys.executable, "-X", "importtime", "-m", "slotmoe", "run", str(small_export), "x"]
    pipes = {"stdout": PIPE, "stderr": PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
        for line in child.stderr:
            if "torch._utils" in line:
                break
        child.send_signal(signal.SIGINT)
        out, err = child.communicate()
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert (child.returncode, out, said) == (130, "", ["", "slotmoe: interrupted"])


@pytest.mark.usefixtures("processes")
def test_reader_that_leaves(sample_export):
    options = "-n 400 --temperature 1 --seed 5".split()
    with Forked("run", sample_export, PROMPT, *options) as child:
        assert child.stdout.read(1)
        child.stdout.close()
        assert (child.stderr.read(), child.wait()) == (b"", 1)


def test_reader_that_leaves_where_a_pipe_says_so_in_other_words(monkeypatch):
    """On Windows, which click does not know."""
    monkeypatch.setattr(system, "NO_READER", (errno.EINVAL, "Invalid argument"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    with pytest.raises(SystemExit, match="1"):
        cli._ending(OSError(errno.EINVAL, "Invalid argument"), False)
    for problem in (OSError(errno.EINVAL, "Else"), OSError(errno.EINVAL, "Invalid argument", "a")):
        assert cli._ending(problem, False)[1] == 1


@pytest.mark.usefixtures("processes")
def test_stdin_that_is_no_text(small_export):
    child = Forked("run", small_export, "-", stdin=PIPE)
    told = b"slotmoe: stdin: the prompt is not valid UTF-8 text\n"
    assert child.communicate(b"caf\xe9") == (b"", told) and child.returncode == 2


def test_without_native_kernels_torch_serves_and_says_so_once(run, monkeypatch):
    monkeypatch.setattr("slotmoe.quant.kernels.cpu.bindings.load", lambda: None)
    code, out, err = run("run EXPORT x -n 3 --context 64")
    assert code == 0 and out and err.count("native kernels were not built") == 1


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
        record = torch.empty(export.layout.record_bytes, dtype=torch.uint8)
        export.read_range(4, 7, 0, record.numpy().data)
        for name in PROJECTIONS:  # padding is zero weights, as the format says
            weight = export.layout.weight(record, name, export.layout.levels())
            tiles, blocks, _ = weight.codes.shape
            shape = 16 * tiles, 64 * blocks
            padded = dequantize(CodedWeight(weight.codes, weight.scales, weight.levels, shape))
            rows, columns = weight.shape
            assert padded[rows:].abs().sum() == padded[:, columns:].abs().sum() == 0
    code, out, _ = slotmoe("bench", made, *BENCH)
    report = json.loads(out)
    assert code == 0 and set(report) >= MEASURED
    assert report["cache"]["misses"] == 0  # slots are filled before the clock starts
