"""From the hub to an export: whatever the network, the server or the disk does, the same bytes or a
clear refusal."""

import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import slotmoe.offload.ingest.download as download
from slotmoe.errors import CheckpointError, ConfigError, DownloadError, ExportError, PlanError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.offload.ingest.download import Range, receive
from slotmoe.offload.ingest.hub import hub_export, quantize_from_hub
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.ingest.repository import Expected, Patience, Remote
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import FORMAT_VERSION, MANIFEST, RESIDENT
from tests.support.disk import Stop, digests, small_disk, stop_at, tree
from tests.support.hub import HEADER_RANGE, NAME, QUICK, TOKEN, Repo, make, weight_requests
from tests.support.tiny import write_checkpoint

ROOT = Path(__file__).parents[2]
SHARDS = 6
FIRST, SECOND, *_ = FILES = [f"model-{n:05d}-of-00006.safetensors" for n in range(1, SHARDS + 1)]
INDEX = "model.safetensors.index.json"
SMALL = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", INDEX]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in six files that split every expert, named like its repository."""
    folder = tmp_path_factory.mktemp("repo") / "tiny"
    sizes = {"num_hidden_layers": 4, "n_routed_experts": 16, "moe_intermediate_size": 256}
    write_checkpoint(folder, SHARDS, **sizes)
    return folder


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory):
    """Bytes of the export that a local folder gives."""
    destination = tmp_path_factory.mktemp("wanted") / "export"
    quantize(source, destination)
    return tree(destination)


@pytest.fixture
def served(hub, source, monkeypatch):
    """The hub with that repository; files arrive in several pieces."""
    monkeypatch.setattr(download, "RANGE_BYTES", 192 << 10)
    hub.add(NAME, Repo(source))
    return hub


def stopped(destination, share, **options):
    with pytest.raises(Stop):
        make(destination, progress=stop_at(share), **options)


def names_of(requests):
    return {one["name"] for one in requests}


def test_same_bytes_as_from_a_folder(served, wanted, tmp_path):
    said, seen, counts, two = [], [], set(), threading.Event()

    def arriving(*now):
        files = (tmp_path / "export.download/weights").iterdir()
        counts.add(len({path.name.partition(".safetensors")[0] for path in files}))
        seen.append(now)
        if 2 in counts:
            two.set()

    def progress(done, total):
        seen.append((done, total))
        assert done == 0 or two.wait(30), "one is quantized and the next arrives"

    make(tmp_path / "export", notify=said.append, progress=progress, arriving=arriving)
    assert tree(tmp_path / "export") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert max(counts) == 2
    assert all(done <= total for done, total in seen)
    assert "6 of 6 weight files to download, 6.2 MiB" in said[0]
    assert "at most 2.4 MiB for weight files" in said[1]
    tokens = {(one["kind"] == "cdn", one["token"]) for one in served.requests}
    assert tokens == {(False, f"Bearer {TOKEN}"), (True, None)}, "it does not follow elsewhere"
    assert [one["revision"] for one in served.asked("api")] == ["main"], "resolved once"
    assert {one["revision"] for one in served.requests if one["kind"] != "api"} == {"a" * 40}
    assert names_of(weight_requests(served)) == {*FILES}
    assert len(weight_requests(served)) > 5 * SHARDS, "in several ranges"


def test_keep_source(served, source, wanted, tmp_path):
    stopped(tmp_path / "export", 0.6, keep_source=True)
    assert list((tmp_path / "export.source").iterdir()) != []
    with pytest.raises(ConfigError, match=r"config.json: is missing"):
        open_checkpoint(tmp_path / "export.source")  # half of it is no checkpoint
    os.truncate(next((tmp_path / "export.partial").rglob("layer*")), 100)
    make(tmp_path / "export", keep_source=True)
    assert tree(tmp_path / "export") == wanted
    assert tree(tmp_path / "export.source") == tree(source)
    (tmp_path / "export" / RESIDENT).unlink()
    served.requests.clear()
    make(tmp_path / "export", keep_source=True)
    assert tree(tmp_path / "export") == wanted
    assert weight_requests(served) == [], "what was kept is used"
    assert tree(tmp_path / "export.source") == tree(source)


def test_too_little_disk_is_known_before_any_weight(served, wanted, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = sum(map(len, wanted.values())) + (17 << 20)  # enough for the export alone
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 40, 1 << 40, free))
    with pytest.raises(ExportError, match=r"needs [\d.]+ MiB of free disk"):
        make(tmp_path / "export")
    assert weight_requests(served) == []


def test_stopped_it_goes_on_with_its_revision_and_its_files(served, wanted, tmp_path):
    write_checkpoint(tmp_path / "other", shards=3)
    stopped(tmp_path / "export", 0.5, workers=1)
    state = json.loads((tmp_path / "export.partial/state.json").read_text())
    assert len(state["written"]) > 25
    served.add(NAME, Repo(tmp_path / "other", "b" * 40))  # main is another commit from here on
    served.add(NAME, Repo(tmp_path / "other", "b" * 40), "v2")
    with pytest.raises(ExportError, match="--overwrite"):
        make(tmp_path / "export", revision="v2")
    served.requests.clear()
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
    assert names_of(weight_requests(served)) <= {*FILES[2:]}
    assert served.asked("small") == served.asked("api") == [], "the plan and the headers are there"
    make(tmp_path / "export", overwrite=True)
    assert tree(tmp_path / "export") != wanted


def test_resumes_inside_a_file(served, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "RANGE_BYTES", 64 << 20)  # one range a file
    with pytest.raises(Stop):
        make(tmp_path / "export", arriving=stop_at(0.12))
    served.requests.clear()
    seen = []
    make(tmp_path / "export", arriving=lambda *now: seen.append(now))
    first = next(one for one in weight_requests(served) if one["name"] == FIRST)
    least = 0.12 * seen[0][1]
    assert int(first["range"].removeprefix("bytes=").split("-")[0]) >= least - (256 << 10)
    assert seen[0][0] >= least, "what is there counts from the start"
    assert tree(tmp_path / "export") == wanted


def test_single_file_and_existing_destination(hub, tmp_path):
    write_checkpoint(tmp_path / "tiny", hidden_size=72, moe_intermediate_size=37)
    hub.add(NAME, Repo(tmp_path / "tiny"))
    make(tmp_path / "export", resident="nf4")
    quantize(tmp_path / "tiny", tmp_path / "local", resident="nf4")
    assert tree(tmp_path / "export") == tree(tmp_path / "local")
    before = tree(tmp_path)
    with pytest.raises(ExportError, match="exists; pass --overwrite"):
        make(tmp_path / "export")
    assert tree(tmp_path) == before, "nothing is left of the attempt"


@pytest.mark.parametrize("place", ["export.download", "export.source"])
def test_foreign_folder_is_never_emptied(place, served, tmp_path):
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ExportError, match=place):
        make(tmp_path / "export", keep_source=True)
    assert (tmp_path / place / "thesis.txt").read_text() == "ten years of work"


def test_disk_really_fills_up(served, wanted, tmp_path, monkeypatch, processes):
    message = "the disk is full; make room and run the same command to resume"
    monkeypatch.setattr("slotmoe.offload.ingest.quantize.check_space", lambda partial, needed: None)
    with small_disk(tmp_path, "1m") as (disk, resize):
        for size in ("2m", "4m", "64m"):
            with pytest.raises(ExportError, match=message):
                make(disk / "export")
            assert not (disk / "export").exists()
            resize(size)
        make(disk / "export")
        assert tree(disk) == {f"export/{name}": data for name, data in wanted.items()}


# Runs in a process of its own: imports once, then forks a child for every attempt, which kills
# itself at some of its reports of progress.
KILLER = """
import json, os, shutil, signal, sys
from pathlib import Path
import huggingface_hub, torch
from slotmoe.offload.ingest import download
from slotmoe.offload.ingest.hub import quantize_from_hub
from tests.support.disk import digests, forked
work, events = Path(sys.argv[1]), 0
download.RANGE_BYTES, download.SAVE_SECONDS = 192 << 10, 0
def attempt(share="nothing"):
    def run():
        seen = 0
        def count(_done, _total):
            nonlocal seen
            seen += 1
            due = any(work.glob(share)) if isinstance(share, str) else seen >= share * events
            if due:
                os.kill(os.getpid(), signal.SIGKILL)
        reports = {"progress": count, "arriving": count}
        quantize_from_hub("org/tiny", "main", work / "export", workers=2, **reports)
        work.with_name("events").write_text(str(seen))
    return forked(run)
def whole(status):
    return [status, {name.removeprefix("export/"): sum for name, sum in digests(work).items()}]
work.mkdir()
report = {"found": [whole(attempt())], "killed": 0}
events = int(work.with_name("events").read_text())
for shares in json.loads(sys.argv[2]):
    shutil.rmtree(work)
    work.mkdir()
    for share in shares:
        report["killed"] += os.WIFSIGNALED(attempt(share))
    report["found"].append(whole(attempt()))
print(json.dumps(report))
"""
_random = random.Random(7)
# At the first report that finds such a file, or after a share of the reports, one after the other.
KILLS = [["*.partial/state.json", 0.05], ["*.download/weights/*.ranges"]]
MORE_KILLS = [[_random.random() for _ in range(_random.choice((1, 2, 4)))] for _ in range(90)]


@pytest.mark.parametrize("kills", [KILLS, pytest.param(MORE_KILLS, marks=pytest.mark.slow)])
def test_killed_at_some_moment_it_resumes(kills, served, source, tmp_path, processes):
    command = [sys.executable, "-c", KILLER, tmp_path / "work", json.dumps(kills)]
    report = json.loads(subprocess.check_output(command, cwd=ROOT))
    quantize(source, tmp_path / "export")
    sums = digests(tmp_path / "export")
    assert report["found"] == [[0, sums]] * (len(kills) + 1)
    assert report["killed"] >= len(kills)


def fill_cache(names):
    from huggingface_hub import constants, hf_hub_download

    for name in names:
        hf_hub_download(NAME, name, cache_dir=constants.HF_HUB_CACHE)
    return Path(constants.HF_HUB_CACHE)


@pytest.mark.filterwarnings("ignore")
def test_cached_files_are_used_and_stay(served, wanted, tmp_path):
    cache = fill_cache([*SMALL, FIRST, SECOND])
    with open(cache / "models--org--tiny" / "snapshots" / ("a" * 40) / SECOND, "r+b") as file:
        file.seek(70_000)
        file.write(b"damage")
    before = tree(cache)
    served.requests.clear()
    said = []
    make(tmp_path / "export", notify=said.append)
    assert tree(tmp_path / "export") == wanted
    assert tree(cache) == before
    assert served.asked("small") == []
    assert names_of(weight_requests(served)) == {*FILES[1:]}
    assert any("is damaged, so it is not used" in text for text in said)


@pytest.mark.filterwarnings("ignore")
def test_without_a_network_the_cache_is_enough_or_what_is_missing_is_named(
    served, wanted, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    fill_cache([*SMALL, *FILES[:-2]])
    missing = "2 of 6 weight files can't be had .* model-0000[56]-.*, model-0000[56]-.*;"
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(CheckpointError, match=missing):
            make(tmp_path / "export")
        with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE.*cache holds nothing of it"):
            quantize_from_hub("org/other", "main", tmp_path / "other")
    fill_cache(FILES)
    served.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
    assert served.requests == []


def config(**changes):
    def change(repo):
        path = repo.files["config.json"]
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def index(file):
    def change(repo):
        found = json.loads(repo.files[INDEX].read_text())
        found["weight_map"]["x"] = file
        repo.files[INDEX].write_text(json.dumps(found))

    return change


def without(*names):
    return lambda repo: [repo.files.pop(name) for name in names]


def terabyte(repo):
    with open(repo.files[LAST], "r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))


*_, LAST = THREE = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
PATHS = "../x.safetensors", "/etc/x.safetensors", "C:x.safetensors", "x.bin"
REFUSED = {
    "missing tensor": (config(num_hidden_layers=4), r"model.layers.3.*is missing"),
    "unsupported": (config(scoring_func="sigmoid"), "scoring_func"),
    "huge config": (lambda repo: repo.sizes.update({"config.json": 1 << 40}), "a real model's"),
    "no config": (without("config.json"), "has no config.json"),
    "no weights": (without(*THREE), "3 of 3 weight files can't be had"),
    "size of text": (lambda repo: repo.sizes.update({LAST: "9"}), "1 of 3 weight files"),
    "odd checksum": (lambda repo: repo.checksums.update({LAST: "../x"}), "1 of 3 weight files"),
    "header of a terabyte": (terabyte, "header of 1099511627784 bytes"),
    **{file: (index(file), "is not a plain .safetensors file name") for file in PATHS},
    "no name": (index(5), "weight_map.x is 5"),
}


def test_options_that_cannot_work_are_refused_before_any_weight(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    write_checkpoint(tmp_path / "tiny")
    hub.add(NAME, Repo(tmp_path / "tiny"))
    for options in ({"ram": "10MiB"}, {"context": 999}, {"draft": "mtp"}):
        with pytest.raises((ConfigError, PlanError)):
            Runtime.open(NAME, **options)
    assert weight_requests(hub) == []
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", REFUSED)
def test_bad_repository_is_refused_before_any_weight(name, hub, tmp_path):
    write_checkpoint(tmp_path / "tiny", shards=3)
    repo = Repo(tmp_path / "tiny")
    change, message = REFUSED[name]
    change(repo)
    hub.add(NAME, repo)
    before = tree(tmp_path)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        make(tmp_path / "export")
    assert weight_requests(hub) == []
    assert name != "unsupported" or names_of(hub.requests) == {None, "config.json"}
    if name not in ("missing tensor", "header of a terabyte"):  # it has read headers
        assert tree(tmp_path) == before


def test_run_from_the_hub_is_made_once_and_then_needs_no_network(
    served, slotmoe, tmp_path, monkeypatch, processes
):
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    code, _, err = slotmoe("quantize", NAME)  # without DST where ``run`` looks for it
    assert code == 0 and err.endswith('Run it: slotmoe run tiny "Your prompt"\n')
    assert "6 of 6 weight files to download" in err
    out = slotmoe("run", "tiny", "It is", "-n", 3)[1]
    served.repos.clear()
    served.requests.clear()
    assert slotmoe("run", NAME, "It is", "-n", 3)[:2] == (0, out)
    with Runtime.open(NAME, context=64) as runtime:
        assert runtime.config.num_hidden_layers == 4
    assert served.requests == []
    assert (tmp_path / "cache" / f"org--tiny-{'a' * 12}-{FORMAT_VERSION}lut" / MANIFEST).is_file()


def test_cached_export_is_made_by_one_of_two(served, wanted, tmp_path):
    with ThreadPoolExecutor() as pool:
        made = pool.map(lambda _: hub_export(NAME, None, tmp_path, patience=QUICK), range(2))
    (export,) = set(made)
    assert tree(export) == wanted


def test_folder_goes_before_the_hub(served, source, slotmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(source, tmp_path / NAME)
    code, _, err = slotmoe("quantize", NAME, "export")
    assert code == 0
    assert "org/tiny is a folder here, so it is not looked up on the hub" in err
    assert served.requests == []
    code, _, err = slotmoe("quantize", NAME, "export2", "--revision", "main")
    assert (code, "leave out --revision" in err) == (2, True)


def test_command_line_codes(served, slotmoe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("slotmoe.offload.ingest.hub.Patience", lambda: QUICK)
    served.faults.append(lambda kind, name, handler: kind == "cdn" and handler.drop())
    code, out, err = slotmoe("quantize", NAME, "export")
    assert (code, out) == (1, "")
    assert "run the same command again to resume" in err
    assert TOKEN not in err
    served.faults.clear()
    code, out, err = slotmoe("quantize", NAME, "export", "--json")
    assert (code, err, json.loads(out)["bytes"] > 2e6) == (0, "", True)


@pytest.fixture
def ctrl_c():
    """Raises ``KeyboardInterrupt``, even where the tests run in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("headers", [True, False])
def test_ctrl_c_does_not_wait_for_a_silent_server(headers, served, wanted, tmp_path, ctrl_c):
    interrupted = threading.Event()

    def silent(kind, name, handler):
        if kind == "cdn" and headers == (handler.headers["Range"] == HEADER_RANGE):
            if not interrupted.is_set():
                interrupted.set()
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            return served.hold(handler)
        return False

    served.faults.append(silent)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "export")
    assert served.outlasted == 0
    served.faults.clear()
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_proxy_of_the_environment(monkeypatch, network):
    """A full address for http, a tunnel for https, and no proxy for what NO_PROXY names."""
    from huggingface_hub import get_async_session

    heads, listener = [], socket.create_server(("127.0.0.1", 0))

    def answer():
        while True:
            connection, _ = listener.accept()
            with connection:
                heads.append(connection.recv(1 << 16).decode().lower())

    async def download(url):
        remote = Remote("org/tiny", "a" * 40, "x", Expected(9, ""), url, Patience(30, 1))
        async with get_async_session() as client:
            await receive(client, remote, Range(0, 9, 0), lambda data: None)

    threading.Thread(target=answer, daemon=True).start()
    place = f"127.0.0.1:{listener.getsockname()[1]}"
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://user:p%40ss@{place}")
    for url, not_by, first in (
        ("http://hub.test/a?b", "", "get http://hub.test/a?b http/1.1\r\n"),
        ("https://hub.test:8443/a", "", "connect hub.test:8443 http/1.1\r\n"),
        (f"http://{place}/a?b", "127.0.0.1", "get /a?b http/1.1\r\n"),
    ):
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, not_by)
        with pytest.raises(DownloadError, match=r"the connection to .* failed"):
            asyncio.run(download(url))
        head = heads.pop()
        assert head.startswith(first)
        assert ("proxy-authorization: basic dxnlcjpwqhnz\r\n" in head) == (not not_by)
