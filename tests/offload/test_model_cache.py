"""The cache folder: a checkpoint folder finds its export again, wherever and however old it is, and
finds no other's; what is there is listed and removed."""

import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from slotmoe.offload import model_cache
from slotmoe.offload.ingest import cached
from slotmoe.offload.ingest.cached import cached_export
from tests.support.disk import Stop, stop_at
from tests.support.hostile import flip
from tests.support.tiny import write_checkpoint


@pytest.fixture
def made(monkeypatch):
    """The folders that were quantized."""
    folders, original = [], cached.quantize

    def quantize(source, *arguments, **options):
        folders.append(source)
        return original(source, *arguments, **options)

    monkeypatch.setattr(cached, "quantize", quantize)
    return folders


@pytest.fixture
def source(tmp_path):
    write_checkpoint(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_that_moved_or_was_touched_is_not_quantized_again(
    heavy, source, made, tmp_path, monkeypatch
):
    """A known folder is not even read; a removed export is made again."""
    export = cached_export(source, tmp_path / "cache", notify=(said := []).append)
    assert said[0].startswith(f"{source} is quantized once, into {export}: ")
    (source / "README.md").write_text("more")
    assert cached_export(source, tmp_path / "cache") == export
    for path in source.iterdir():
        os.utime(path, (1, 1))
    assert cached_export(source, tmp_path / "cache") == export
    source.rename(tmp_path / "elsewhere")
    assert cached_export(tmp_path / "elsewhere", tmp_path / "cache") == export
    shutil.copytree(tmp_path / "elsewhere", tmp_path / "copy")
    assert cached_export(tmp_path / "copy", tmp_path / "cache") == export
    assert made == [source]
    source = tmp_path / "copy"
    with monkeypatch.context() as patch:
        patch.setattr(cached, "content_key", None)
        assert cached_export(source, tmp_path / "cache") == export
    shutil.rmtree(export)
    with pytest.raises(Stop):
        cached_export(source, tmp_path / "cache", progress=stop_at(0.9))
    source = shutil.copytree(source, tmp_path / "disk" / "copy")  # begins anew what was stopped
    assert (cached_export(source, tmp_path / "cache") / "slotmoe.json").is_file()
    assert len(made) == 3


def test_one_other_byte_makes_another_export(source, made, tmp_path):
    """Even where sizes and times are the same."""
    export = cached_export(source, tmp_path / "cache")
    path = source / "model.safetensors"
    before = path.stat()
    flip(path, -3)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cached_export(source, tmp_path / "cache") != export
    assert len(made) == 2


@pytest.fixture
def cache(source, tmp_path, monkeypatch, processes):
    """A cache with an export of a folder, one of the hub's, and work that was not finished."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("SLOTMOE_CACHE", str(cache))
    export = cached_export(source, cache)
    hub = cache / f"org--tiny-{'a' * 12}-1"
    shutil.copytree(export, hub)
    (cache / "org--tiny@main.json").write_text(json.dumps({"commit": "a" * 40}))
    (cache / "org--tiny@old.json").write_text(json.dumps({"commit": "b" * 40}))
    (cache / "model-000000000000.partial").mkdir()
    (cache / "machine.json").write_text("{}")
    (cache / "chat_history").write_text("")
    (cache / "notes").mkdir()
    (cache / "link").symlink_to(source.parent)
    for age, path in enumerate([hub, export, cache / "model-000000000000.partial"]):
        os.utime(path, (time.time() - 90000 * age - 5,) * 2)
    return cache


def test_what_is_listed(cache, source, slotmoe):
    code, out, err = slotmoe("list", "--json")
    report = json.loads(out)
    assert (code, err) == (0, "")
    names = [export["name"] for export in report["exports"]]
    assert [e["source"] for e in report["exports"]] == ["org/tiny", str(source), None]
    assert [e["finished"] for e in report["exports"]] == [True, True, False]
    size = sum(path.stat().st_size for path in (cache / names[1]).rglob("*") if path.is_file())
    assert report["exports"][1]["bytes"] == pytest.approx(size, rel=0.2)
    out = slotmoe("list")[1]
    shorts = [export["short"] for export in report["exports"]]
    assert shorts == ["tiny", "model", names[2]] and all(f"  {name}" in out for name in shorts)
    assert all(words in out for words in ("(unfinished)", "of org/tiny", "1 day ago"))
    cached_export(source, cache)  # what was used last is first
    first = json.loads(slotmoe("list", "--json")[1])["exports"][0]
    assert first["source"] == str(source)


def test_removing(cache, source, slotmoe, made):
    for name in ("notes", "machine.json", "..", "../model", "", "/"):
        code, _, err = slotmoe("rm", name)
        assert (code, err.count("\n")) == (2, 1)
        assert source.exists() and (cache / "notes").exists()
    export = model_cache.listing(cache)[1].name
    assert f"did you mean {export}?" in slotmoe("rm", export[:-1])[2]
    code, out, _ = slotmoe("rm", source, "model-000000000000.partial", "--json")
    assert (code, json.loads(out)["removed"]) == (0, [export, "model-000000000000.partial"])
    assert slotmoe("rm", "org/tiny")[1].startswith(f"org--tiny-{'a' * 12}-1: removed, ")
    left = ["chat_history", "link", "machine.json", "notes", "org--tiny@old.json", "tokenizers"]
    assert sorted(path.name for path in cache.iterdir()) == left


def test_all_is_removed_or_nothing(cache, slotmoe):
    """Where one name is unknown, or what it stands for is being written."""
    there = sorted(cache.iterdir())
    code, _, err = slotmoe("rm", "tiny", "nothing")
    assert (code, "holds no 'nothing'" in err) == (2, True)
    handle = os.open(cache / "model-000000000000.partial", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        code, _, err = slotmoe("rm", "tiny", "model-000000000000.partial")
        assert (code, "another process is writing it" in err) == (2, True)
    finally:
        os.close(handle)
    assert sorted(cache.iterdir()) == there


# Names


@pytest.fixture
def elsewhere(cache, tmp_path, monkeypatch):
    """A folder without any model in it."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")


def test_names(cache, elsewhere, source, processes, slotmoe):
    """An export is found from everywhere, by its short name, its folder's, and a part that no other
    has; a path goes before a name, and a name of several is refused."""
    folder = next(path for path in cache.iterdir() if path.name.startswith("org--tiny-"))
    said = []
    for name in ("tiny", folder.name, "org/tiny"):
        found = model_cache.locate(name, notify=said.append)
        assert found == (None if "/" in name else folder) and not said
    assert model_cache.locate("TIN", notify=said.append) == folder
    assert said.pop() == f"TIN is tiny, in {cache}"
    assert slotmoe("run", "tiny", "x", "-n", 2)[0] == 0
    assert "did you mean tiny?" in slotmoe("run", "tinny", "x")[2]
    shutil.copytree(source, "tiny")
    assert model_cache.locate("tiny", notify=said.append) == Path("tiny")
    assert "tiny is here, so" in said[0]
    other = cache / f"model-{'b' * 12}"
    shutil.copytree(next(filter(model_cache.is_export, cache.glob("model-*"))), other)
    for command in (["run", "model", "x"], ["verify", "mod"]):
        code, _, err = slotmoe(*command)
        assert code == 2 and ": may be any of" in err and other.name in err
