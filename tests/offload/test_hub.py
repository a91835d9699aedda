"""From the hub to an export: whatever the network, the server or the disk does, the same bytes or a
clear refusal."""

import asyncio
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import namedtuple
from contextlib import suppress
from pathlib import Path

import pytest

import slotmoe.offload.ingest.download as download
from slotmoe.errors import CheckpointError, ConfigError, DownloadError, ExportError
from slotmoe.model.checkpoint import Checkpoint
from slotmoe.offload.ingest.download import Range, fetch, receive
from slotmoe.offload.ingest.hub import hub_export, quantize_from_hub
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.ingest.repository import Expected, Patience, Remote
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import FORMAT_VERSION, MANIFEST, RESIDENT
from tests.support.disk import Stop, small_disk, stop_at, tree
from tests.support.hub import HEADER_RANGE, NAME, QUICK, TOKEN, Repo, make, reshard, weight_requests
from tests.support.params import nth
from tests.support.tiny import SAMPLE, write_checkpoint

ROOT = Path(__file__).parents[2]
SHARDS = 12
FIRST = "model-00001-of-00012.safetensors"


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The bundled sample in twelve files that split nearly every expert, named like its
    repository."""
    return reshard(SAMPLE, tmp_path_factory.mktemp("repo") / "tiny", SHARDS)


@pytest.fixture(scope="module")
def wanted(sample, tmp_path_factory):
    """Bytes of the export that a local folder gives."""
    destination = tmp_path_factory.mktemp("wanted") / "export"
    quantize(sample, destination)
    return tree(destination)


@pytest.fixture
def served(hub, sample, monkeypatch):
    """The hub with that repository; files arrive in several pieces."""
    monkeypatch.setattr(download, "RANGE_BYTES", 512 << 10)
    hub.add(NAME, Repo(sample))
    return hub


def test_same_bytes_as_from_a_folder(served, wanted, tmp_path):
    said, most, seen = [], set(), []

    def progress(done, total):
        weights = {
            path.name.removesuffix(".incomplete").removesuffix(".ranges")
            for path in (tmp_path / "export.download/weights").iterdir()
        }
        most.add(len(weights))
        seen.append((done, total))

    make(
        tmp_path / "export",
        notify=said.append,
        progress=progress,
        arriving=lambda done, total: seen.append((done, total)),
    )
    assert tree(tmp_path / "export") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert max(most) == 2, "one is quantized and one arrives"
    assert all(done <= total for done, total in seen)
    assert "12 of 12 weight files to download, 30.6 MiB" in said[0]
    assert "at most 8.3 MiB for weight files" in said[1]
    assert "afterwards the export remains" in said[1]
    assert {one["token"] for one in served.requests if one["kind"] != "cdn"} == {f"Bearer {TOKEN}"}
    assert {one["token"] for one in served.asked("cdn")} == {None}, (
        "the token must not follow to another host"
    )
    assert [one["revision"] for one in served.asked("api")] == ["main"], "resolved once"
    assert {one["revision"] for one in served.requests if one["kind"] != "api"} == {"a" * 40}
    assert len({one["name"] for one in weight_requests(served)}) == SHARDS
    assert len(weight_requests(served)) > 5 * SHARDS, "in several ranges"


def test_single_file_and_resident_mode(hub, tmp_path):
    write_checkpoint(tmp_path / "tiny", hidden_size=72, moe_intermediate_size=37)
    hub.add(NAME, Repo(tmp_path / "tiny"))
    make(tmp_path / "export", resident="nf4")
    quantize(tmp_path / "tiny", tmp_path / "local", resident="nf4")
    assert tree(tmp_path / "export") == tree(tmp_path / "local")


def test_keep_source(served, sample, wanted, tmp_path):
    make(tmp_path / "export", keep_source=True)
    assert tree(tmp_path / "export") == wanted
    assert tree(tmp_path / "export.source") == tree(sample)
    (tmp_path / "export" / RESIDENT).unlink()
    served.requests.clear()
    make(tmp_path / "export", keep_source=True)
    assert tree(tmp_path / "export") == wanted
    assert weight_requests(served) == [], "what was kept is used"
    assert tree(tmp_path / "export.source") == tree(sample)


def test_unsupported_model_is_refused_before_any_weight(hub, tmp_path):
    write_checkpoint(tmp_path / "tiny", shards=3)
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    (tmp_path / "tiny/config.json").write_text(json.dumps({**config, "scoring_func": "sigmoid"}))
    hub.add(NAME, Repo(tmp_path / "tiny"))
    with pytest.raises(ConfigError, match="scoring_func"):
        make(tmp_path / "export")
    assert {one["name"] for one in hub.requests} == {None, "config.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_missing_tensor_is_known_from_the_headers(hub, tmp_path):
    write_checkpoint(tmp_path / "tiny", shards=3)
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    (tmp_path / "tiny/config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    hub.add(NAME, Repo(tmp_path / "tiny"))
    with pytest.raises(CheckpointError, match=r"model.layers.3.*is missing"):
        make(tmp_path / "export")
    assert weight_requests(hub) == []


def test_too_little_disk_is_known_before_any_weight(served, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: usage(1 << 40, 1 << 40, 33 << 20)
    )  # enough for the export alone
    said = []
    with pytest.raises(ExportError, match=r"needs [\d.]+ MiB of free disk"):
        make(tmp_path / "export", notify=said.append)
    assert weight_requests(served) == []
    assert "free" in said[1]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 40, 1 << 40, 36 << 20))
    make(tmp_path / "export")


def test_revision_that_moves_half_way(served, wanted, tmp_path):
    write_checkpoint(tmp_path / "other", shards=3)
    moved = Repo(tmp_path / "other", "b" * 40)
    with pytest.raises(Stop):
        make(tmp_path / "export", progress=stop_at(0.4))
    served.add(NAME, moved)  # main is another commit from here on
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
    assert len(served.asked("api")) == 1
    make(tmp_path / "next")
    assert tree(tmp_path / "next") != wanted


def test_finished_weight_files_are_not_fetched_again(served, wanted, tmp_path):
    with pytest.raises(Stop):
        make(tmp_path / "export", workers=1, progress=stop_at(0.5))
    state = json.loads((tmp_path / "export.partial/state.json").read_text())
    done = {name for file in state["written"].values() for name in file}
    assert len(done) > 100
    served.requests.clear()
    said = []
    make(tmp_path / "export", notify=said.append)
    assert tree(tmp_path / "export") == wanted
    fetched = {one["name"] for one in weight_requests(served)}
    assert fetched <= {f"model-{shard:05d}-of-00012.safetensors" for shard in range(6, 13)}
    assert served.asked("small") == [], "the plan and the headers are there"
    assert served.asked("api") == []


def test_resumes_inside_a_file(served, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RANGE_BYTES", 64 << 20)  # one range a file
    with pytest.raises(Stop):
        make(tmp_path / "export", arriving=stop_at(0.02))
    served.requests.clear()
    seen = []
    make(tmp_path / "export", arriving=lambda done, total: seen.append(done))
    first = next(one for one in weight_requests(served) if one["name"] == FIRST)
    assert int(first["range"].removeprefix("bytes=").split("-")[0]) >= 0.02 * 30e6 - (256 << 10)
    assert seen[0] >= 0.02 * 30e6, "what is there counts from the start"
    assert tree(tmp_path / "export") == wanted


def test_existing_destination(served, tmp_path):
    make(tmp_path / "export", resident="bf16")
    before = tree(tmp_path)
    with pytest.raises(ExportError, match="exists; pass --overwrite"):
        make(tmp_path / "export")
    assert tree(tmp_path) == before, "nothing is left of the attempt"
    make(tmp_path / "export", resident="bf16")  # the same again
    assert tree(tmp_path) == before


def test_begun_with_something_else(served, wanted, tmp_path):
    served.add(NAME, served.repos[NAME, "main"], "v2")
    with pytest.raises(Stop):
        make(tmp_path / "export", progress=stop_at(0.4))
    with pytest.raises(ExportError, match="--overwrite"):
        make(tmp_path / "export", revision="v2")
    make(tmp_path / "export", revision="v2", overwrite=True)
    assert tree(tmp_path / "export") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("place", ["export.download", "export.source"])
def test_foreign_folder_is_never_emptied(place, served, tmp_path):
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ExportError, match=place):
        make(tmp_path / "export", keep_source=True)
    assert (tmp_path / place / "thesis.txt").read_text() == "ten years of work"


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("megabytes", nth(3, [3, 1, 8, 14]))
def test_disk_really_fills_up(megabytes, served, wanted, tmp_path, monkeypatch):
    with small_disk(tmp_path, f"{megabytes}m") as (disk, resize):
        with monkeypatch.context() as patch:
            patch.setattr(
                "slotmoe.offload.ingest.quantize.check_space", lambda partial, needed: None
            )
            with pytest.raises(
                ExportError, match="the disk is full; make room and run the same command to resume"
            ):
                make(disk / "export")
        assert not (disk / "export").exists()
        resize("64m")
        make(disk / "export")
        assert tree(disk) == {f"export/{name}": data for name, data in wanted.items()}


@pytest.mark.usefixtures("processes")
def test_peak_disk_is_two_weight_files_beyond_the_export(served, wanted, sample, tmp_path):
    with small_disk(tmp_path, "64m") as (disk, _):
        peak = 0

        def measure(_done, _total):
            nonlocal peak
            peak = max(peak, shutil.disk_usage(disk).used)

        make(disk / "export", progress=measure, arriving=measure)
        assert tree(disk / "export") == wanted
        shard = max(path.stat().st_size for path in sample.iterdir())
        export = sum(map(len, wanted.values()))
        assert peak <= export + 2 * shard + (2 << 20), "headers, state and rounding to pages"


MEASURED = """
import json, sys
from pathlib import Path
import huggingface_hub, torch, slotmoe.offload.ingest.hub
def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
work, peak = Path(sys.argv[1]), 0
def measure(_done, _total):
    global peak
    now = 0
    for path in work.rglob("*"):
        try:
            now += path.stat().st_blocks * 512
        except FileNotFoundError:
            pass
    peak = max(peak, now)
slotmoe.offload.ingest.hub.quantize_from_hub("org/tiny", "main", work / "export", progress=measure)
print(json.dumps({"peak_disk": peak, "rss_before": before, "peak_rss": status("VmHWM")}))
"""


@pytest.mark.usefixtures("nightly")
def test_peak_memory_and_disk_at_real_sizes(hub, tmp_path):
    """Three layers of V2-Lite's widths in eight files of 350 MB; run with -s to see the figures."""
    sizes = {
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "intermediate_size": 10944,
        "n_routed_experts": 64,
        "vocab_size": 102400,
    }
    write_checkpoint(
        tmp_path / "tiny", shards=8, num_hidden_layers=3, n_group=1, topk_group=1, **sizes
    )
    hub.add(NAME, Repo(tmp_path / "tiny"))
    (tmp_path / "work").mkdir()
    child = subprocess.run(
        [sys.executable, "-c", MEASURED, tmp_path / "work"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    report = json.loads(child.stdout)
    export = sum(
        path.stat().st_size for path in (tmp_path / "work" / "export").rglob("*") if path.is_file()
    )
    shard = max(path.stat().st_size for path in (tmp_path / "tiny").iterdir())
    print({**report, "export": export, "largest_weight_file": shard})
    assert report["peak_disk"] <= export + 2 * shard + (4 << 20)
    assert report["peak_rss"] - report["rss_before"] < 600 << 20


# Runs in a process of its own: imports once, then forks a child for every attempt and kills it.
KILLER = """
import json, os, random, shutil, signal, sys, threading, time
from pathlib import Path
import huggingface_hub, torch
from slotmoe.offload.ingest import download
from slotmoe.offload.ingest.hub import quantize_from_hub
from tests.support.disk import digests, forked
work, kills = Path(sys.argv[1]), int(sys.argv[2])
download.RANGE_BYTES, download.SAVE_SECONDS = 512 << 10, 0.02
def attempt(after=None, event=None):
    '''Quantize in a child that is killed ``after`` seconds, or shortly after its ``event``-th
    report of progress.'''
    def run():
        seen = 0
        def count(_done, _total):
            nonlocal seen
            seen += 1
            if seen == event:
                delay, kill = random.SystemRandom().random() * 0.03, (os.getpid(), signal.SIGKILL)
                threading.Timer(delay, os.kill, kill).start()
        destination, reports = work / "export", {"progress": count, "arriving": count}
        quantize_from_hub("org/tiny", "main", destination, workers=2, **reports)
        (work / "events").write_text(str(seen))
    return forked(run, after)
work.mkdir()
start = time.perf_counter()
assert attempt() == 0
duration, events = time.perf_counter() - start, int((work / "events").read_text())
(work / "events").unlink()
wanted = digests(work)
report = {"killed": 0, "wrong": [], "rounds": 0, "state": 0, "ranges": 0}
report |= {"duration": duration, "events": events, "files": wanted}
generator = random.Random(int(sys.argv[3]))
while report["killed"] < kills:
    shutil.rmtree(work)
    work.mkdir()
    report["rounds"] += 1
    for _ in range(generator.choice((1, 2, 4))):
        if generator.random() < 0.25:
            when = {"after": generator.random() * duration}
        else:
            when = {"event": generator.randint(1, events)}
        if not os.WIFSIGNALED(attempt(**when)):
            break
        report["killed"] += 1
        report["state"] += any(work.glob("*.partial/state.json"))
        report["ranges"] += any(work.glob("*.download/weights/*.ranges"))
    status = attempt()
    (work / "events").unlink(missing_ok=True)
    files = digests(work)
    if status != 0 or files != wanted:
        names = [name for name in {**files, **wanted} if files.get(name) != wanted.get(name)]
        report["wrong"].append([status, names])
print(json.dumps(report))
"""


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("kills", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, hub, sample, tmp_path):
    source = sample
    if kills < 100:
        write_checkpoint(tmp_path / "tiny", shards=SHARDS)
        source = tmp_path / "tiny"
    hub.add(NAME, Repo(source))
    quantize(source, tmp_path / "export")
    wanted = tree(tmp_path / "export")
    command = [
        sys.executable,
        "-c",
        KILLER,
        str(tmp_path / "work"),
        str(kills),
        os.environ.get("KILL_SEED", "7"),
    ]
    child = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert child.returncode == 0, child.stderr.decode()
    report = json.loads(child.stdout)
    print({key: value for key, value in report.items() if key != "files"})
    assert report["wrong"] == [], child.stderr.decode()
    assert sorted(report["files"]) == sorted(f"export/{name}" for name in wanted)
    assert report["state"] >= kills // 4
    assert tree(tmp_path / "work" / "export") == wanted


def fill_cache(names):
    from huggingface_hub import constants, hf_hub_download

    for name in names:
        hf_hub_download(NAME, name, cache_dir=constants.HF_HUB_CACHE)
    return Path(constants.HF_HUB_CACHE)


SMALL = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
]


@pytest.mark.filterwarnings("ignore")
def test_cached_files_are_used_and_stay(served, sample, wanted, tmp_path):
    cache = fill_cache([*SMALL, FIRST])
    damaged = (
        cache / "models--org--tiny" / "snapshots" / ("a" * 40) / "model-00002-of-00012.safetensors"
    )
    fill_cache([damaged.name])
    with open(damaged, "r+b") as file:
        file.seek(70_000)
        file.write(b"damage")
    before = tree(cache)
    served.requests.clear()
    said = []
    make(tmp_path / "export", notify=said.append)
    assert tree(tmp_path / "export") == wanted
    assert tree(cache) == before
    assert served.asked("small") == []
    fetched = {one["name"] for one in weight_requests(served)}
    assert FIRST not in fetched
    assert damaged.name in fetched
    assert any("is damaged, so it is not used" in text for text in said)


@pytest.mark.filterwarnings("ignore")
def test_without_a_network_the_cache_is_enough_or_what_is_missing_is_named(
    served, sample, wanted, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    shards = sorted(path.name for path in sample.glob("*.safetensors"))
    fill_cache([*SMALL, *shards[:-2]])
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            CheckpointError, match=f"2 of 12 weight files can't be had.*{shards[-2]}, {shards[-1]};"
        ):
            make(tmp_path / "export")
        with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE.*cache holds nothing of it"):
            quantize_from_hub("org/other", "main", tmp_path / "other")
    fill_cache(shards)
    served.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
    assert served.requests == []


@pytest.mark.usefixtures("network")
@pytest.mark.filterwarnings("ignore")
def test_hub_that_can_not_be_reached(served, tmp_path, monkeypatch):
    from huggingface_hub import constants

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            DownloadError, match=r"connection to .* failed .*connect to the network"
        ):
            make(tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


HOSTILE_INDEX = [
    "../x.safetensors",
    "/etc/x.safetensors",
    "a/b.safetensors",
    "..\\x.safetensors",
    "C:x.safetensors",
    ".x.safetensors",
    "x.bin",
    5,
]


@pytest.mark.parametrize("file", HOSTILE_INDEX, ids=str)
def test_path_tricks_in_the_index(file, hub, tmp_path):
    write_checkpoint(tmp_path / "tiny", shards=3)
    index = tmp_path / "tiny/model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "x": file}}))
    hub.add(NAME, Repo(tmp_path / "tiny"))
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match=r"is not a plain .safetensors file name"):
        make(tmp_path / "export")
    assert hub.asked("cdn") == []
    assert tree(tmp_path) == before


HOSTILE_REPO = {
    "huge-config": (
        lambda repo: repo.sizes.update({"config.json": 1 << 40}),
        "not a real model's file",
    ),
    "no-config": (lambda repo: repo.files.pop("config.json"), "has no config.json"),
    "no-weights": (
        lambda repo: [repo.files.pop(name) for name in list(repo.lfs)],
        "3 of 3 weight files can't be had",
    ),
    "size-of-text": (
        lambda repo: repo.sizes.update({"model-00001-of-00003.safetensors": "9"}),
        "1 of 3 weight files",
    ),
    "odd-checksum": (
        lambda repo: repo.checksums.update({"model-00001-of-00003.safetensors": "../x"}),
        "1 of 3 weight files",
    ),
}


@pytest.mark.parametrize("name", HOSTILE_REPO)
def test_hostile_repository(name, hub, tmp_path):
    write_checkpoint(tmp_path / "tiny", shards=3)
    repo = Repo(tmp_path / "tiny")
    HOSTILE_REPO[name][0](repo)
    hub.add(NAME, repo)
    with pytest.raises(CheckpointError, match=HOSTILE_REPO[name][1]):
        make(tmp_path / "export")
    assert not [path for path in tmp_path.iterdir() if path.name != "tiny"]


def test_header_that_claims_a_terabyte(hub, tmp_path):
    write_checkpoint(tmp_path / "tiny", shards=3)
    with open(tmp_path / "tiny/model-00002-of-00003.safetensors", "r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))
    hub.add(NAME, Repo(tmp_path / "tiny"))
    with pytest.raises(CheckpointError, match="header of 1099511627784 bytes"):
        make(tmp_path / "export")


@pytest.mark.usefixtures("processes")
def test_run_from_the_hub_is_made_once_and_then_needs_no_network(
    served, slotmoe, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    code, out, err = slotmoe("run", NAME, "It is", "-n", 3)
    assert code == 0
    assert "12 of 12 weight files to download" in err
    served.repos.clear()
    served.requests.clear()
    assert slotmoe("run", NAME, "It is", "-n", 3)[:2] == (0, out)
    with Runtime.open(NAME, context=64) as runtime:
        assert runtime.config.num_hidden_layers == 8
    assert served.requests == []
    assert (tmp_path / "cache" / f"org--tiny-{'a' * 12}-{FORMAT_VERSION}" / MANIFEST).is_file()
    with pytest.raises(ConfigError, match="quantize=False"):
        Runtime.open(NAME, quantize=False)


def test_cached_export_is_made_by_one_of_two(served, wanted, tmp_path):
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(hub_export(NAME, None, tmp_path, patience=QUICK))
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert tree(found[0]) == wanted
    assert len(found) == 2


def test_folder_goes_before_the_hub(served, sample, slotmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sample, tmp_path / NAME)
    code, _, err = slotmoe("quantize", NAME, "export")
    assert code == 0
    assert "org/tiny is a folder here, so it is not looked up on the hub" in err
    assert served.requests == []
    code, _, err = slotmoe("quantize", NAME, "export2", "--revision", "main")
    assert (code, "leave out --revision" in err) == (2, True)
    code, _, err = slotmoe("run", "export", "x", "--revision", "main")
    assert (code, "leave the revision out" in err) == (2, True)


def test_command_line_codes(served, slotmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slotmoe.offload.ingest.hub.Patience", lambda: QUICK)
    code, out, err = slotmoe("quantize", "org/nothing", "export")
    assert (code, out) == (2, "")
    assert "org/nothing: is no folder here and no model on" in err
    assert err.count("\n") == 1
    served.faults.append(lambda kind, name, handler: kind == "cdn" and handler.drop())
    code, out, err = slotmoe("quantize", NAME, "export")
    assert (code, out) == (1, "")
    assert "run the same command again to resume" in err
    assert TOKEN not in err
    served.faults.clear()
    code, out, err = slotmoe("quantize", NAME, "export", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["bytes"] > 10e6


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("moment", nth(2, ["weights", "headers"]))
def test_interrupted(moment, served, wanted, tmp_path):
    hold = threading.Event()
    served.faults.append(
        lambda kind, name, handler: (
            kind == "cdn"
            and (moment == "headers") == (handler.headers["Range"] == HEADER_RANGE)
            and (hold.wait(20) or handler.drop())
        )
    )
    command = [sys.executable, "-m", "slotmoe", "quantize", NAME, str(tmp_path / "export")]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while child.poll() is None and not (
        served.asked("cdn") if moment == "headers" else weight_requests(served)
    ):
        time.sleep(0.01)
    time.sleep(0.1)
    child.send_signal(2)
    start = time.perf_counter()
    message = child.communicate()[1].decode()
    hold.set()
    assert child.returncode == 130
    assert "Traceback" not in message
    assert "run the same command again to resume" in message
    assert time.perf_counter() - start < 15, "it does not wait for a silent server"
    served.faults.clear()
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


@pytest.mark.usefixtures("network")
def test_proxy_of_the_environment(monkeypatch):
    """A full address for http, a tunnel for https, and no proxy for what NO_PROXY names."""
    from huggingface_hub import get_async_session

    heads, listener = [], socket.create_server(("127.0.0.1", 0))

    def answer():
        while True:
            connection, _ = listener.accept()
            with connection:
                heads.append(connection.recv(1 << 16).decode().lower())

    threading.Thread(target=answer, daemon=True).start()
    place = f"127.0.0.1:{listener.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://user:p%40ss@{place}")

    def ask(url):
        remote = Remote("org/tiny", "a" * 40, "x", Expected(9, ""), url, Patience(5, 1))

        async def download():
            async with get_async_session() as client:
                await receive(client, remote, Range(0, 9, 0), lambda data: None)

        with pytest.raises(DownloadError, match=r"the connection to .* failed"):
            asyncio.run(download())
        return heads.pop()

    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    head = ask("http://hub.test/a?b")
    assert head.startswith("get http://hub.test/a?b http/1.1\r\n")
    assert "proxy-authorization: basic dxnlcjpwqhnz\r\n" in head
    head = ask("https://hub.test:8443/a")
    assert head.startswith("connect hub.test:8443 http/1.1\r\n")
    assert "proxy-authorization: basic dxnlcjpwqhnz\r\n" in head
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    head = ask(f"http://{place}/a?b")
    assert head.startswith("get /a?b http/1.1\r\n")
    assert "proxy-authorization" not in head


@pytest.mark.usefixtures("network", "processes")
def test_refused_certificate(tmp_path):
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out certificate"
    subject = ["-days", "2", "-subj", "/CN=127.0.0.1"]
    subprocess.run([*command.split(), *subject], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        with suppress(OSError), context.wrap_socket(listener, server_side=True) as secure:
            secure.accept()

    url = f"https://127.0.0.1:{listener.getsockname()[1]}/x"
    threading.Thread(target=answer, daemon=True).start()
    remote = Remote("org/tiny", "a" * 40, "x", Expected(9, ""), url, Patience(5, 8))
    with pytest.raises(DownloadError, match=r"certificate is refused .*SSL_CERT_FILE names others"):
        asyncio.run(fetch(remote, tmp_path / "x"))


def test_kept_half_is_no_checkpoint(served, tmp_path):
    with pytest.raises(Stop):
        make(tmp_path / "export", progress=stop_at(0.6), keep_source=True)
    assert list((tmp_path / "export.source").iterdir()) != []
    with pytest.raises(ConfigError, match=r"config.json: is missing"):
        Checkpoint.open(tmp_path / "export.source")
