"""From the hub to an export: whatever the network, the server or the disk does, the same bytes or a
clear refusal."""

import json
import shutil
import signal
import threading
from collections import namedtuple

import pytest

from slotmoe.errors import CheckpointError, ConfigError, DownloadError, ExportError
from slotmoe.offload.ingest.cached import quantize_from_hub
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.export.layout import FORMAT_VERSION, MANIFEST, RESIDENT
from tests.support.disk import Stop, stop_at, tree
from tests.support.forkserver import Forked
from tests.support.hostile import edit_json
from tests.support.hub import (
    HUB,
    NAME,
    TOKEN,
    Repo,
    answer,
    data_of,
    faulty,
    fill_cache,
    too_many,
    wrong_bytes,
)
from tests.support.slab import NF4S
from tests.support.tiny import write_checkpoint

FIRST, SECOND, *_, LAST = FILES = [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
INDEX = "model.safetensors.index.json"
SIZES = {"n_routed_experts": 16, "moe_intermediate_size": 256}
SMALL = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", INDEX]


def make(destination, revision="main", **options):
    """By codes that are made at once."""
    return quantize_from_hub(NAME, revision, destination, codecs=NF4S, **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in files that split every expert, named like its repository."""
    folder = tmp_path_factory.mktemp("repo") / "tiny"
    write_checkpoint(folder, len(FILES), **SIZES)
    return folder


@pytest.fixture(scope="module")
def wanted(source, network, tmp_path_factory):
    """Bytes of the export.  But for what the manifest says of the source a local folder gives the
    same."""
    folder = tmp_path_factory.mktemp("wanted")
    HUB.reset()
    HUB.add(NAME, Repo(source))
    make(folder / "export")
    quantize(source, folder / "local", codecs=NF4S)
    made, local = tree(folder / "export"), tree(folder / "local")
    assert made | {MANIFEST: b""} == local | {MANIFEST: b""}
    return made


@pytest.fixture
def served(hub, source):
    hub.add(NAME, Repo(source))
    return hub


def test_one_file_arrives_while_one_is_quantized(served, wanted, tmp_path):
    """Each once, at most two on the disk, and the token goes to the hub alone."""
    said, seen, counts, two = [], [], set(), threading.Event()

    def arriving(*now):
        weights = tmp_path / "export.download/weights"
        counts.add(len([*weights.glob("*.safetensors"), *weights.rglob("*.incomplete")]))
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
    assert "4 of 4 weight files to download, 4.5 MiB" in said[0]
    assert "at most 2.8 MiB for weight files" in said[1]
    tokens = {(one["kind"] == "cdn", one["token"]) for one in served.requests}
    assert tokens == {(False, f"Bearer {TOKEN}"), (True, None)}
    assert [one["revision"] for one in served.asked("api")] == ["main"], "resolved once"
    assert {one["revision"] for one in served.requests if one["kind"] != "api"} == {"a" * 40}
    assert served.whole() == FILES


def test_keep_source(served, source, wanted, tmp_path):
    """What was kept is used."""
    with pytest.raises(Stop):
        make(tmp_path / "export", progress=stop_at(0.6), keep_source=True)
    make(tmp_path / "export", keep_source=True)
    assert tree(tmp_path / "export.source") == tree(source)
    (tmp_path / "export" / RESIDENT).unlink()
    served.requests.clear()
    make(tmp_path / "export", keep_source=True)
    assert tree(tmp_path / "export") == wanted
    assert served.whole() == []


@pytest.mark.parametrize("place", ["export.download", "export.source"])
def test_foreign_folder_is_never_emptied(place, served, tmp_path):
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ExportError, match=place):
        make(tmp_path / "export", keep_source=True)
    assert (tmp_path / place / "thesis.txt").read_text() == "ten years of work"


def test_too_little_disk_is_known_before_any_weight(served, wanted, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    free = sum(map(len, wanted.values())) + (17 << 20)  # enough for the export alone
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 40, 1 << 40, free))
    with pytest.raises(ExportError, match=r"needs [\d.]+ MiB of free disk"):
        make(tmp_path / "export")
    assert served.whole() == []


def test_stopped_it_goes_on_with_its_revision_and_its_files(served, wanted, tmp_path):
    write_checkpoint(tmp_path / "other", shards=3)
    with pytest.raises(Stop):
        make(tmp_path / "export", progress=stop_at(0.6), workers=1)
    state = json.loads((tmp_path / "export.partial/state.json").read_text())
    assert len(state["written"]) > 25
    served.add(NAME, Repo(tmp_path / "other", "b" * 40))  # main is another commit from here on
    served.add(NAME, Repo(tmp_path / "other", "b" * 40), "v2")
    with pytest.raises(ExportError, match="--overwrite"):
        make(tmp_path / "export", "v2")
    made = served.whole()
    served.requests.clear()
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
    assert sorted({*made, *served.whole()}) == FILES
    assert len(made) + len(served.whole()) <= len(FILES) + 1, "at most one file again"
    assert served.asked("small") == served.asked("api") == [], "the plan and the headers are there"
    make(tmp_path / "export", overwrite=True)
    assert tree(tmp_path / "export") != wanted


def test_a_revision_that_moved_on_is_of_the_same_weights_or_is_refused(served, source, tmp_path):
    """By the hub's checksums, so no weight comes for that."""
    make(tmp_path / "export")
    made, said = tree(tmp_path), []
    other = shutil.copytree(source, tmp_path / "tiny")
    served.add(NAME, Repo(other, "b" * 40))
    served.requests.clear()
    make(tmp_path / "export", notify=said.append)
    assert said[0].endswith("is this export already")
    write_checkpoint(other, len(FILES), seed=1, **SIZES)
    served.add(NAME, Repo(other, "c" * 40))
    with pytest.raises(ExportError, match=rf"^{NAME}/{FIRST}: is not .*found hub .*--overwrite"):
        make(tmp_path / "export")
    assert served.whole() == []
    shutil.rmtree(other)
    assert tree(tmp_path) == made


# Forks a child for every attempt, which kills itself at the first progress that finds such a file.
KILLER = """
import json, os, signal, sys
from pathlib import Path
from slotmoe.offload.ingest.cached import quantize_from_hub
from tests.support.disk import forked
from tests.support.slab import NF4S
work = Path(sys.argv[1])
def attempt(file):
    def run():
        def look(_done, _total):
            if any(work.parent.rglob(file)):
                os.kill(os.getpid(), signal.SIGKILL)
        options = {"workers": 2, "codecs": NF4S, "progress": look, "arriving": look}
        quantize_from_hub("org/tiny", "main", work, **options)
    return forked(run)
killed = [os.WIFSIGNALED(attempt(file)) for file in sys.argv[2:]]
print(json.dumps([killed, attempt("nothing")]))
"""


def test_killed_it_resumes(served, wanted, tmp_path, processes):
    """At most one file comes again for each kill."""
    destination = tmp_path / "work" / "export"
    (tmp_path / "work").mkdir()
    with Forked(destination, "*.incomplete", "layer-*", program=KILLER) as child:
        killed, status = json.loads(child.communicate()[0])
    assert (status, tree(destination)) == (0, wanted)
    assert all(killed)
    assert len(served.whole()) <= len(FILES) + len(killed)


@pytest.mark.filterwarnings("ignore")
def test_what_is_cached_is_used_and_without_a_network_enough_or_what_is_missing_is_named(
    served, wanted, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    cache = fill_cache([*SMALL, FIRST, SECOND])
    with open(cache / "models--org--tiny" / "snapshots" / ("a" * 40) / SECOND, "r+b") as file:
        file.seek(70_000)
        file.write(b"damage")
    before, said = tree(cache), []
    served.requests.clear()
    make(tmp_path / "export", notify=said.append)
    assert tree(tmp_path / "export") == wanted
    assert tree(cache) == before
    assert (served.asked("small"), served.whole()) == ([], FILES[1:])
    assert any("is damaged, so it is not used" in text for text in said)
    shutil.rmtree(cache)
    fill_cache([*SMALL, *FILES[:-1]])
    served.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"1 of 4 weight files can't be had .* model-00004-"):
        make(tmp_path / "other")
    with pytest.raises(DownloadError, match=r"HF_HUB_OFFLINE.*cache holds nothing of it"):
        quantize_from_hub("org/other", "main", tmp_path / "other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fill_cache(FILES)
    served.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    make(tmp_path / "other")
    assert tree(tmp_path / "other") == wanted
    assert served.requests == []


def edited(name, change):
    return lambda repo: edit_json(repo.files[name], change)


def terabyte(repo):
    with open(repo.files[LAST], "r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))


NO_SIGMOID = edited("config.json", lambda values: values.update(scoring_func="sigmoid"))
MORE = edited("config.json", lambda values: values.update(num_hidden_layers=4))
PATH = edited(INDEX, lambda values: values["weight_map"].update(x="../x.safetensors"))
REFUSED = {
    "missing tensor": (MORE, r"model.layers.3.*is missing"),
    "unsupported": (NO_SIGMOID, "scoring_func"),
    "huge config": (lambda repo: repo.sizes.update({"config.json": 1 << 40}), "a real model's"),
    "no weights": (lambda repo: [repo.files.pop(name) for name in FILES], "4 of 4 weight files"),
    "header of a terabyte": (terabyte, "header of 1099511627784 bytes"),
    "a path": (PATH, "is not a plain .safetensors file name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_repository_is_refused_before_any_weight(name, hub, source, tmp_path):
    shutil.copytree(source, tmp_path / "tiny")
    repo = Repo(tmp_path / "tiny")
    change, message = REFUSED[name]
    change(repo)
    hub.add(NAME, repo)
    before = tree(tmp_path)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        make(tmp_path / "export")
    assert hub.whole() == []
    assert name != "unsupported" or {it["name"] for it in hub.requests} == {None, "config.json"}
    assert tree(tmp_path) == before


# What goes wrong with which requests, so many times: it is borne.
BEARABLE = {
    "no ranges": ("header", lambda handler: handler.answer(200, data_of(handler)), 9),
    "drops": ("cdn", lambda handler: handler.drop(), 5),
    "429": ("cdn", answer(429, Retry_After="0"), 6),
    "expired address": ("cdn", answer(403), 2),
    "wrong bytes once": ("cdn", wrong_bytes, 1),
}


@pytest.mark.parametrize("name", BEARABLE)
def test_bearable_faults(name, served, wanted, tmp_path):
    left, seen = faulty(served, *BEARABLE[name]), []
    make(tmp_path / "export", arriving=lambda *now: seen.append(now))
    assert tree(tmp_path / "export") == wanted
    assert left[0] == 0 or name == "no ranges", "the fault happened"
    assert seen[-1][0] == seen[-1][1], "what was thrown away is not counted twice"


GATED = answer(403, X_Error_Code="GatedRepo")
BAD_TOKEN = answer(401, X_Error_Message="Invalid credentials in Authorization header")
OTHER_COMMIT = answer(200, b"", X_Repo_Commit="b" * 40, ETag='"x"')
HOTEL = answer(200, b"<html>Please log in to the hotel")
UNBEARABLE = [
    ("cdn", wrong_bytes, DownloadError, "have the checksum"),
    ("cdn", too_many, DownloadError, "more bytes than the .* that the hub promises"),
    ("cdn", answer(500), DownloadError, "the server answers 500; gave up after 3 attempts"),
    ("cdn", HUB.hold, DownloadError, r"the connection .*\(.*timed out\)"),
    ("header", wrong_bytes, CheckpointError, "damaged or truncated"),
    ("small", OTHER_COMMIT, DownloadError, "have the checksum"),
    ("small", GATED, ConfigError, "is gated; ask for access at http.*/org/tiny"),
    ("api", BAD_TOKEN, ConfigError, "refuses access .401.; the token may be wrong"),
    ("api", answer(404, X_Error_Code="RevisionNotFound"), ConfigError, "no revision 'main'"),
    ("api", HOTEL, DownloadError, "does not answer like a hub"),
]


@pytest.mark.parametrize(("kind", "act", "error", "message"), UNBEARABLE)
def test_unbearable_faults(kind, act, error, message, served, wanted, tmp_path, monkeypatch):
    if act == HUB.hold:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    faulty(served, kind, act)
    with pytest.raises(error, match=message):
        make(tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert not [*tmp_path.rglob("*.incomplete")], "no half file is left"
    assert (tmp_path / "export.download").exists() == (kind == "cdn"), "what came can be used"
    if kind == "cdn":
        served.faults.clear()
        make(tmp_path / "export")
        assert tree(tmp_path / "export") == wanted


def test_a_header_that_is_not_the_files_is_found(served, tmp_path):
    """One bit of it, which would be in the manifest."""

    def other_header(handler):
        data = bytearray(data_of(handler))
        data[data.index(b'"pt"') + 1] ^= 1
        return handler.answer(206, bytes(data))

    faulty(served, "header", other_header)
    with pytest.raises(DownloadError, match="the header that came before is not the one"):
        make(tmp_path / "export")


def test_run_from_the_hub_is_made_once_and_then_needs_no_network(
    served, slotmoe, tmp_path, monkeypatch, processes
):
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    code, _, err = slotmoe("quantize", NAME)  # without DST where ``run`` looks for it
    assert code == 0 and err.endswith('Run it: slotmoe run tiny "Your prompt"\n')
    out = slotmoe("run", "tiny", "It is", "-n", 3)[1]
    served.repos.clear()
    served.requests.clear()
    assert slotmoe("run", NAME, "It is", "-n", 3)[:2] == (0, out)
    assert served.requests == []
    assert (tmp_path / "cache" / f"org--tiny-{'a' * 12}-{FORMAT_VERSION}lut" / MANIFEST).is_file()


@pytest.mark.parametrize("kind", ["header", "cdn", "small"])
def test_ctrl_c_does_not_wait_for_a_silent_server(kind, served, wanted, tmp_path):
    interrupted = threading.Event()

    def silent(handler):
        if not interrupted.is_set():
            interrupted.set()
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return served.hold(handler)

    faulty(served, kind, silent)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "export")
    assert served.outlasted == 0
    served.faults.clear()
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
