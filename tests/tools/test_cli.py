"""The command line: exit codes, one clear line of complaint, and what goes to stdout and what to
stderr."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.coded import CodedWeight
from slotmoe.quant.export.layout import PROJECTIONS
from slotmoe.quant.export.reader import Export
from slotmoe.quant.weights import dequantize
from slotmoe.tools.cli import main
from tests.support.tiny import write_checkpoint

ROOT = Path(__file__).parents[2]
PROMPT = "It is a truth universally acknowledged, that"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny export, and the checkpoint it was made from."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "checkpoint")
    quantize(folder / "checkpoint", folder / "export")
    return folder


@pytest.fixture
def slotmoe(model, capsys):
    """Run one command in this process: exit code, stdout, stderr.  EXPORT and CHECKPOINT stand for
    the tiny model."""

    def run(*arguments):
        places = {"EXPORT": str(model / "export"), "CHECKPOINT": str(model / "checkpoint")}
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as caught:
                main([places.get(argument, argument) for argument in arguments])
        finally:
            signal.signal(signal.SIGTERM, before)
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return run


def started(*arguments, **options):
    pipes = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "stdin": subprocess.DEVNULL,
        **options,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "slotmoe", *map(str, arguments)], cwd=ROOT, **pipes
    )


BAD_USE = {
    "no-such-folder": (["run", "nowhere", "x"], "nowhere: no such folder"),
    "folder-without-model": (["run", "tests", "x"], "config.json"),
    "model-is-file": (["run", "setup.py", "x"], "setup.py"),
    "no-arguments": (["run"], "MODEL"),
    "no-prompt": (["run", "EXPORT"], "PROMPT"),
    "unknown-command": (["fly"], "fly"),
    "unknown-option": (["run", "EXPORT", "x", "--fast"], "--fast"),
    "unknown-device": (["run", "EXPORT", "x", "--device", "tpu"], "tpu"),
    "unknown-policy": (["run", "EXPORT", "x", "--cache-policy", "best"], "best"),
    "size-without-number": (["run", "EXPORT", "x", "--ram", "lots"], "'lots' is not a size"),
    "size-negative": (["run", "EXPORT", "x", "--ram", "-1GiB"], "'-1GiB' is not a size"),
    "size-of-unknown-unit": (["run", "EXPORT", "x", "--ram", "8GiBB"], "8GiBB"),
    "size-zero": (["run", "EXPORT", "x", "--ram", "0"], "'0' is not a possible size"),
    "size-endless": (["run", "EXPORT", "x", "--ram", "9" * 400 + "GiB"], "is not a size"),
    "misses-without-gpu": (
        ["run", "EXPORT", "x", "--device", "cpu", "--misses", "fetch"],
        "misses fetch",
    ),
    "vram-without-gpu": (["run", "EXPORT", "x", "--device", "cpu", "--vram", "1GiB"], "--vram"),
    "temperature-negative": (["run", "EXPORT", "x", "--temperature", "-1"], "temperature is -1"),
    "temperature-nan": (["run", "EXPORT", "x", "--temperature", "nan"], "temperature is nan"),
    "temperature-text": (["run", "EXPORT", "x", "--temperature", "hot"], "hot"),
    "top-p-zero": (["run", "EXPORT", "x", "--top-p", "0"], "top_p is 0"),
    "top-p-above-one": (["run", "EXPORT", "x", "--top-p", "1.5"], "top_p is 1.5"),
    "top-k-negative": (["run", "EXPORT", "x", "--top-k", "-3"], "top_k is -3"),
    "seed-negative": (["run", "EXPORT", "x", "--seed", "-1"], "seed is -1"),
    "seed-huge": (["run", "EXPORT", "x", "--seed", str(1 << 80)], "seed is"),
    "no-new-tokens": (
        ["run", "EXPORT", "x", "-n", "0"],
        "max_new_tokens is 0, expected at least 1 (option -n)",
    ),
    "threads-zero": (["run", "EXPORT", "x", "--threads", "0"], "threads is 0"),
    "threads-too-many": (["run", "EXPORT", "x", "--threads", "300"], "expected 1 to 256"),
    "size-of-bytes": (["run", "EXPORT", "x", "--ram", "3"], "'3' is 3 bytes; write the unit"),
    "two-prompts": (["run", "EXPORT", "x", "--file", "setup.py"], "both given"),
    "file-missing": (["run", "EXPORT", "--file", "nowhere"], "nowhere"),
    "misspelt-command": (["rnu", "EXPORT", "x"], "did you mean run?"),
    "misspelt-option": (["run", "EXPORT", "x", "--temprature", "1"], "'--temperature'"),
    "misspelt-model": (["run", "samplee", "x"], "did you mean sample?"),
    "geometry-as-model": (["run", "v2-lite", "x"], "is a geometry, without weights"),
    "misspelt-geometry": (["plan", "v2-lit"], "did you mean v2-lite?"),
    "beyond-the-model": (["run", "EXPORT", "x " * 300], "are all that the model has"),
    "context-zero": (["run", "EXPORT", "x", "--context", "0"], "context 0"),
    "context-beyond-model": (["run", "EXPORT", "x", "--context", "257"], "max_position_embeddings"),
    "prompt-beyond-context": (
        ["run", "EXPORT", "one two three four five", "--context", "3"],
        "the context holds 3",
    ),
    "prompt-no-utf8": (["run", "EXPORT", "caf\udce9"], "UTF-8"),
    "slots-too-few": (["run", "EXPORT", "x", "--slots", "2"], "at least 3"),
    "trace-nowhere": (["run", "EXPORT", "x", "--trace", "nowhere/trace"], "nowhere/trace"),
    "quantize-export": (["quantize", "EXPORT", "dst"], "is an export already"),
    "quantize-nothing": (["quantize", "nowhere", "dst"], "nowhere: no such folder"),
    "quantize-no-destination": (["quantize", "CHECKPOINT"], "DST"),
    "quantize-onto-itself": (
        ["quantize", "CHECKPOINT", "CHECKPOINT", "--overwrite"],
        "not an export",
    ),
    "quantize-onto-export": (
        ["quantize", "CHECKPOINT", "EXPORT", "--resident", "nf4"],
        "--overwrite",
    ),
    "quantize-resident": (["quantize", "CHECKPOINT", "dst", "--resident", "int4"], "int4"),
    "quantize-workers": (["quantize", "CHECKPOINT", "dst", "--workers", "0"], "workers"),
    "quantize-nowhere": (["quantize", "CHECKPOINT", "nowhere/dst"], "nowhere/dst"),
}


@pytest.mark.parametrize("name", BAD_USE)
def test_bad_use_is_one_line_and_exit_code_2(name, slotmoe, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, wanted = BAD_USE[name]
    code, out, err = slotmoe(*arguments)
    assert (code, out) == (2, "")
    assert wanted in err
    assert "Traceback" not in err
    if err.startswith("slotmoe: "):
        assert err.count("\n") == 1
    else:  # click's own: usage, a hint, the error
        assert err.startswith("Usage: ")
    assert not Path("dst").exists()


def test_shortfall_is_told(slotmoe):
    code, _, err = slotmoe("run", "EXPORT", "x", "--ram", "1MiB")
    assert code == 2
    for part in ("needs at least", "the budget is 1.0 MiB", "short", "--ram", "--context"):
        assert part in err


def test_more_memory_than_there_is(slotmoe, monkeypatch):
    code, _, err = slotmoe("run", "EXPORT", "x", "-n", "1", "--ram", "800TiB")
    assert (code, err.count("\n")) == (0, 2)
    assert "--ram 800TiB is more than this machine has" in err
    assert "more than" not in slotmoe("run", "EXPORT", "x", "-n", "1", "--ram", "4GiB")[2]
    monkeypatch.setattr("slotmoe.offload.loading.total_memory", lambda: 1 << 20)
    code, _, err = slotmoe("run", "EXPORT", "x", "-n", "1")
    assert (code, err.count("\n")) == (2, 1)
    assert "of RAM and this machine has 1.0 MiB: give a smaller --ram" in err


def test_damaged_export_is_exit_code_2(model, tmp_path, slotmoe):
    shutil.copytree(model / "export", tmp_path / "export")
    path = tmp_path / "export" / "resident.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, out, err = slotmoe("run", str(tmp_path / "export"), "x")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "resident.safetensors" in err


def test_text_goes_to_stdout_and_statistics_to_stderr(slotmoe):
    code, out, err = slotmoe("run", "EXPORT", "Hello", "-n", "5")
    assert code == 0
    assert out.endswith("\n")
    assert err.count("\n") == 1
    assert re.fullmatch(
        r"stopped at 5 tokens \(-n\) · [\d.]+ tokens/s · first token \d+\.\d s"
        r" · \d+\.\d( MiB)? of \d+\.\d GiB\n",
        err,
    )
    verbose = slotmoe("run", "EXPORT", "Hello", "-n", "5", "--verbose")[2]
    assert all(part in verbose for part in ("on cpu", "prefill", "hits", "tokens/s · first token"))
    assert slotmoe("run", "EXPORT", "Hello", "-n", "5")[1] == out
    sampled = [
        slotmoe("run", "EXPORT", "Hello", "-n", "5", "--temperature", "2", "--seed", seed)[1]
        for seed in ("1", "1", "2")
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_json_is_one_object(slotmoe):
    text = slotmoe("run", "EXPORT", "Hello", "-n", "5")[1]
    code, out, err = slotmoe("run", "EXPORT", "Hello", "-n", "5", "--json")
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert report["text"] + "\n" == text
    assert len(report["ids"]) == len(report["logprobs"]) <= 5
    assert report["prefill_tokens_per_second"] > 0
    assert {"cache", "io", "memory"} <= set(report)


def test_quantize_reports(model, slotmoe, tmp_path):
    code, out, err = slotmoe("quantize", "CHECKPOINT", str(tmp_path / "one"))
    assert (code, out) == (0, "")
    outcome, advice = err.splitlines()
    assert re.fullmatch(rf"{tmp_path / 'one'}: .* in .* s \(.*\), \d\.\d\d bits a weight", outcome)
    assert advice == f'Run it: slotmoe run {tmp_path / "one"} "Your prompt"'
    err = slotmoe("quantize", "CHECKPOINT", str(tmp_path / "three"), "--verbose")[2]
    assert err.index("What quantization cost") < err.index("bits a weight")
    code, out, err = slotmoe(
        "quantize", "CHECKPOINT", str(tmp_path / "two"), "--json", "--resident", "nf4"
    )
    report = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    files = [
        path
        for path in (tmp_path / "two").rglob("*")
        if path.is_file() and path.name != "slotmoe.json"
    ]
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    assert report["quantization"] == "nf4"


@pytest.mark.parametrize("as_json", [False, True])
def test_interrupted_generation(as_json, slotmoe, monkeypatch):
    """Ctrl-C after three tokens, in the middle of the fourth."""
    from slotmoe.model.network import Network

    original, calls = Network.forward, []

    def forward(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *arguments, **options)

    monkeypatch.setattr(Network, "forward", forward)
    code, out, err = slotmoe("run", "EXPORT", "Hello", *(["--json"] if as_json else []))
    assert code == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert ("3 tokens · " in err) != as_json
    assert (out == "") == as_json


def test_every_token_is_printed_at_once(model, tmp_path, monkeypatch):
    from slotmoe.model.network import Network

    original, sizes = Network.forward, []

    def forward(self, *arguments, **options):
        sizes.append((tmp_path / "out").stat().st_size)
        return original(self, *arguments, **options)

    monkeypatch.setattr(Network, "forward", forward)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with (tmp_path / "out").open("w") as out, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            with pytest.raises(SystemExit):
                main(["run", str(model / "export"), "Hello", "-n", "16"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(set(sizes)) > 8, "text waited in a buffer"


@pytest.mark.usefixtures("processes")
def test_help_is_instant_and_needs_no_torch():
    code = """
import sys
from slotmoe.tools.cli import cli
for command in ("", "run", "profile", "quantize"):
    arguments = [*command.split(), "--help"]
    assert cli.main(arguments, prog_name="slotmoe", standalone_mode=False) == 0, arguments
assert cli.main(["--version"], prog_name="slotmoe", standalone_mode=False) == 0
heavy = "torch transformers bitsandbytes numpy tokenizers safetensors matplotlib"
heavy = set(heavy.split())
assert not heavy & set(sys.modules), sorted(sys.modules)
"""
    start = time.perf_counter()
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert time.perf_counter() - start < 2
    for part in ("slotmoe run sample", "--max-new-tokens", "--resident", "Examples:", "\nText:\n"):
        assert part in child.stdout


@pytest.mark.usefixtures("processes")
def test_interrupted_command_exits_130(sample_export):
    child = started(
        "run",
        sample_export,
        "-",
        "-n",
        800,
        "--temperature",
        "1",
        "--seed",
        5,
        "--threads",
        1,
        stdin=subprocess.PIPE,
    )
    child.stdin.write(PROMPT.encode())
    child.stdin.close()
    child.stdin = None
    assert len(child.stdout.read(200)) == 200
    child.send_signal(signal.SIGINT)
    _, err = child.communicate()
    assert child.returncode == 130, err.decode()
    assert "interrupted" in err.decode()
    assert "tokens/s · first token" in err.decode()
    assert "Traceback" not in err.decode()


@pytest.mark.usefixtures("processes")
def test_reader_that_leaves(sample_export):
    child = started("run", sample_export, PROMPT, "-n", 400, "--temperature", "1", "--seed", 5)
    assert child.stdout.read(1)
    child.stdout.close()
    child.stdout = None
    err = child.communicate()[1].decode()
    assert child.returncode == 1
    assert err == ""


@pytest.mark.usefixtures("processes")
def test_stdin_that_is_no_text(model):
    child = started("run", model / "export", "-", stdin=subprocess.PIPE)
    out, err = child.communicate(b"caf\xe9")
    assert (child.returncode, out) == (2, b"")
    assert err == b"slotmoe: stdin: the prompt is not valid UTF-8 text\n"


def test_without_native_kernels_torch_serves_and_says_so_once(slotmoe, monkeypatch):
    monkeypatch.setattr("slotmoe.quant.kernels.cpu.bindings.load", lambda: None)
    code, out, err = slotmoe("run", "EXPORT", "x", "-n", "3", "--context", "64")
    assert code == 0
    assert out
    assert err.count("native kernels were not built") == 1


def test_unknown_config_keys_are_named(slotmoe, tmp_path):
    write_checkpoint(tmp_path / "source", surprising_key=1)
    code, _, err = slotmoe("quantize", str(tmp_path / "source"), str(tmp_path / "export"))
    assert code == 0
    assert "surprising_key" in err


def test_synth_and_bench(slotmoe, tmp_path):
    """A geometry whose sizes fill no tile, layers shared by hard links, and the keys that others
    read."""
    write_checkpoint(
        tmp_path / "source", hidden_size=72, moe_intermediate_size=40, num_hidden_layers=5
    )
    synth = [
        "synth",
        str(tmp_path / "source" / "config.json"),
        str(tmp_path / "random"),
        "--share-layers",
        "2",
        "--json",
    ]
    code, out, _ = slotmoe(*synth, "--resident", "nf4")
    assert code == 0
    assert json.loads(out)["bytes"] > 0
    files = sorted((tmp_path / "random" / "experts").iterdir())
    assert len(files) == 4
    assert len({file.stat().st_ino for file in files}) == 2
    with Export.open(tmp_path / "random") as export:
        assert all(weight.isfinite().all() for weight in export.expert(4, 7).values())
        record = torch.empty(export.layout.record_bytes, dtype=torch.uint8)
        export.read_range(4, 7, 0, record.numpy().data)
        for name in PROJECTIONS:  # padding is zero weights, as the format says
            weight = export.layout.weight(record, name, export.layout.levels())
            tiles, blocks, _ = weight.codes.shape
            padded = dequantize(
                CodedWeight(weight.codes, weight.scales, weight.levels, (16 * tiles, 64 * blocks))
            )
            rows, columns = weight.shape
            assert padded[rows:].abs().sum() == 0
            assert padded[:, columns:].abs().sum() == 0
    assert slotmoe(*synth)[0] == 2  # it exists
    options = [
        "--prompt-tokens",
        "20",
        "--decode-tokens",
        "4",
        "--repetitions",
        "2",
        "--context",
        "64",
        "--json",
    ]
    code, out, _ = slotmoe("bench", str(tmp_path / "random"), *options)
    report = json.loads(out)
    assert code == 0
    assert {"prefill_tokens_per_second", "decode_tokens_per_second", "ceiling", "settings"} <= set(
        report
    )
    assert report["cache"]["misses"] == 0  # slots are filled before the clock starts
    assert len(report["decode_runs"]) == 2
    assert (
        slotmoe("bench", "EXPORT", "--depth", "60", "--decode-tokens", "9", "--context", "64")[0]
        == 2
    )
    assert slotmoe("synth", "v3", str(tmp_path / "v3"))[0] == 2
