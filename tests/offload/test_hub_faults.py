"""What networks and servers do to a download: borne, or refused clearly; in the end always the same
bytes."""

import threading
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest

import slotmoe.offload.ingest.download as download
from slotmoe.errors import CheckpointError, ConfigError, DownloadError
from slotmoe.offload.ingest.hub import quantize_from_hub
from slotmoe.offload.ingest.quantize import quantize
from tests.support.disk import tree
from tests.support.hub import HEADER_RANGE, HUB, NAME, QUICK, Repo, make, weight_requests
from tests.support.params import nth
from tests.support.tiny import write_checkpoint

PIECE = 96 << 10
FIRST = "model-00001-of-00004.safetensors"
# A busy machine makes connections stall that no fault holds: they are tried again and again.
STALLS = replace(QUICK, stall=0.4, attempts=100)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repo") / "tiny"
    write_checkpoint(folder, shards=4)
    return folder


@pytest.fixture(scope="module")
def wanted(checkpoint, tmp_path_factory):
    """Bytes of the export that the local folder gives."""
    destination = tmp_path_factory.mktemp("wanted") / "export"
    quantize(checkpoint, destination)
    return tree(destination)


@pytest.fixture
def served(hub, checkpoint, monkeypatch):
    """The hub with that repository; files arrive in several pieces."""
    monkeypatch.setattr(download, "RANGE_BYTES", PIECE)
    hub.add(NAME, Repo(checkpoint))
    return hub


class Once:
    """A fault for the first ``times`` requests of one kind, beyond those for headers.  No range is
    hit so often that its client gives up."""

    def __init__(self, kind, act, times=1, name=None):
        self.kind, self.act, self.left, self.name = kind, act, times, name
        self.lock, self.hits = threading.Lock(), Counter()

    def __call__(self, kind, name, handler):
        header = handler.headers.get("Range") == HEADER_RANGE
        if kind != self.kind or header or self.name not in (None, name):
            return False
        part = name, handler.headers.get("Range", "").partition("-")[2]
        with self.lock:
            if self.left == 0 or self.hits[part] == QUICK.attempts - 2:
                return False
            self.left -= 1
            self.hits[part] += 1
        return self.act(handler)


def answer(*arguments, **headers):
    return lambda handler: handler.answer(*arguments, **headers)


def drop(handler):
    return handler.drop()


def asked(handler):
    """The file's bytes, and the first and the last that are asked for."""
    name = handler.path.split("?")[0].rpartition("/")[2]
    data = HUB.repos[NAME, "main"].files[name].read_bytes()
    return data, *map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))


def begin(handler):
    """Announce the whole range; returns its bytes."""
    data, first, last = asked(handler)
    handler.send_response(206)
    handler.send_header("Content-Length", str(last + 1 - first))
    handler.send_header("Content-Range", f"bytes {first}-{last}/*")
    handler.end_headers()
    return data[first : last + 1]


def stall(handler):
    begin(handler)
    return HUB.hold(handler)


def wrong_bytes(handler):
    _, first, last = asked(handler)
    span = f"bytes {first}-{last}/*"
    return handler.answer(206, bytes(last + 1 - first), Content_Range=span)


def whole_file(handler):
    """The answer of a server that knows no ranges."""
    return handler.answer(200, asked(handler)[0])


def elsewhere(handler):
    return handler.answer(302, Location=handler.path.replace("?", "?again&"))


BEARABLE = {
    "no-ranges": Once("cdn", whole_file, 6),
    "drops-before-answer": Once("cdn", drop, 20),
    "stalls-before-answer": Once("cdn", HUB.hold, 3),
    "stalls-in-body": Once("cdn", stall, 2),
    "other-range": Once("cdn", answer(206, bytes(1000), Content_Range="bytes 5-1004/*"), 3),
    "500": Once("cdn", answer(500), 6),
    "429": Once("cdn", answer(429, Retry_After="0"), 6),
    "wrong-bytes-once": Once("cdn", wrong_bytes),
    "api-500": Once("api", answer(500), 2),
    "resolve-503": Once("resolve", answer(503), 3),
    "small-drops": Once("small", drop, 2),
    "redirect-to-third-host": Once("cdn", elsewhere, 9),
}


@pytest.mark.parametrize("name", nth(3, BEARABLE))
def test_bearable_faults(name, served, wanted, tmp_path):
    fault, seen = BEARABLE[name], []
    served.faults.append(fault)
    patience = STALLS if "stalls" in name else QUICK
    make(tmp_path / "export", patience=patience, arriving=lambda *now: seen.append(now))
    assert tree(tmp_path / "export") == wanted
    assert fault.left == 0, "the fault happened"
    assert seen[-1][0] == seen[-1][1], "what was thrown away is not counted twice"
    back = [before - done for (before, _), (done, _) in pairwise(seen)]
    assert name == "wrong-bytes-once" or max(back) < 100_000, "no file was thrown away"


def test_address_that_expires_is_asked_for_again(served, wanted, tmp_path):
    def expired(kind, name, handler):
        if kind == "cdn" and handler.headers["Range"] != HEADER_RANGE and name == FIRST:
            served.signature = 1  # what the hub gives out from now on
            return "signature=0" in handler.path and handler.answer(403)
        return False

    served.faults.append(expired)
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_body_that_ends_early_loses_only_what_did_not_come(served, wanted, tmp_path):
    def cut(handler):
        data = begin(handler)
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        return handler.drop()

    served.faults.append(Once("cdn", cut, 1, FIRST))
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
    ranges = [one["range"] for one in weight_requests(served) if one["name"] == FIRST]
    starts = [int(span.removeprefix("bytes=").split("-")[0]) for span in ranges]
    assert any(start % PIECE for start in starts), "it went on inside the piece"


def test_slow_drip_is_a_stall(served, wanted, tmp_path):
    sent = 0

    def drip(handler):
        nonlocal sent
        for byte in begin(handler)[:100]:  # each within the limit of a silent connection
            handler.wfile.write(bytes([byte]))
            sent += 1
            served.over.wait(0.1)
        return handler.drop()

    served.faults.append(Once("cdn", drip, 1))
    make(tmp_path / "export", patience=STALLS)
    assert 0 < sent < 100, "it does not take what drips"
    assert tree(tmp_path / "export") == wanted


def longer(handler):
    span = handler.headers["Range"].replace("=", " ") + "/99999999"
    return handler.answer(206, bytes(100), Content_Range=span)


NO_REPO = {"X_Error_Code": "RepoNotFound"}
NO_REVISION = answer(404, X_Error_Code="RevisionNotFound")
GATED = answer(403, X_Error_Code="GatedRepo")
NO_FILE = answer(404, X_Error_Code="EntryNotFound")
BAD_TOKEN = answer(401, X_Error_Message="Invalid credentials in Authorization header")
OTHER_COMMIT = answer(200, b"", X_Repo_Commit="b" * 40)
OTHER_SIZE = answer(200, b"x", X_Repo_Commit="a" * 40)
NO_COMMIT = answer(200, b'{"id": "x", "sha": "../..", "siblings": []}')
HOTEL = answer(200, b"<html>Please log in to the hotel")
UNBEARABLE = [
    ("cdn", wrong_bytes, DownloadError, "have the checksum"),
    ("cdn", answer(500), DownloadError, "the server answers 500; gave up after 4 attempts"),
    ("cdn", drop, DownloadError, "the connection"),
    ("cdn", HUB.hold, DownloadError, "stalled"),
    ("cdn", longer, DownloadError, "'99999999' bytes, the hub promises"),
    ("cdn", elsewhere, DownloadError, "redirects"),
    ("small", OTHER_SIZE, DownloadError, "'1' bytes, the hub promises"),
    ("small", OTHER_COMMIT, DownloadError, "answers for commit bbbb"),
    ("small", answer(401, **NO_REPO), ConfigError, "no model on .* that you may see; check the"),
    ("small", answer(403), ConfigError, "refuses access .403.*hf auth login"),
    ("small", GATED, ConfigError, "is gated; ask for access at http.*/org/tiny"),
    ("small", NO_FILE, CheckpointError, "not there"),
    ("resolve", answer(403), ConfigError, "refuses access .403.*hf auth login"),
    ("resolve", NO_FILE, CheckpointError, "not there"),
    ("resolve", OTHER_COMMIT, DownloadError, "answers for commit bbbb"),
    ("api", BAD_TOKEN, ConfigError, "refuses access .401.; the token may be wrong"),
    ("api", answer(401, **NO_REPO), ConfigError, "no folder here and no model"),
    ("api", answer(500), DownloadError, "connect to the network"),
    ("api", NO_REVISION, ConfigError, "no revision 'main'"),
    ("api", HOTEL, DownloadError, "does not answer like a hub"),
    ("api", NO_COMMIT, DownloadError, "is none"),
]


@pytest.mark.parametrize(("kind", "act", "error", "message"), UNBEARABLE)
def test_unbearable_faults(kind, act, error, message, served, wanted, tmp_path):
    def fault(asked, file, handler):
        return asked == kind and handler.headers.get("Range") != HEADER_RANGE and act(handler)

    served.faults.append(fault)
    patience = replace(QUICK, stall=0.4) if message == "stalled" else QUICK
    with pytest.raises(error, match=message):
        make(tmp_path / "export", patience=patience)
    assert not (tmp_path / "export").exists()
    begun = kind in ("cdn", "resolve")
    if act != wrong_bytes:  # then nothing may be left, or the file that was arriving next
        assert (tmp_path / "export.download").exists() == begun, "what came can be used"
    if begun:
        served.faults.clear()
        make(tmp_path / "export")
        assert tree(tmp_path / "export") == wanted


def test_renamed_repository(served, wanted, tmp_path):
    """The hub redirects the old name to the new one on its own host, and the token may follow
    there."""
    main = served.repos[NAME, "main"]
    served.repos |= {("old/tiny", "main"): main, ("old/tiny", "a" * 40): main}

    def renamed(kind, name, handler):
        if kind == "cdn" or not handler.path.startswith("/old/"):
            return False
        return handler.answer(307, Location=handler.path.replace("old", "org"))

    served.faults.append(renamed)
    quantize_from_hub("old/tiny", "main", tmp_path / "export", patience=QUICK)
    assert tree(tmp_path / "export") == wanted
