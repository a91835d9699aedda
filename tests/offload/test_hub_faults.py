"""What networks and servers do to a download: borne, or refused clearly; in the end always the same
bytes."""

import threading
import time
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
    hit so often that its client gives up, even where a busy machine fails it once more."""

    def __init__(self, kind, act, times=1, name=None):
        self.kind, self.act, self.left, self.name = kind, act, times, name
        self.lock, self.hits = threading.Lock(), Counter()

    def __call__(self, kind, name, handler):
        if (
            kind != self.kind
            or handler.headers.get("Range") == HEADER_RANGE
            or self.name not in (None, name)
        ):
            return False
        part = name, handler.headers.get("Range", "").partition("-")[2]
        with self.lock:
            if self.left == 0 or self.hits[part] == QUICK.attempts - 2:
                return False
            self.left -= 1
            self.hits[part] += 1
        return self.act(handler)


def partial_body(handler, then):
    """Announce a whole range, send a little of it."""
    first, last = handler.headers["Range"].removeprefix("bytes=").split("-")
    handler.send_response(206)
    handler.send_header("Content-Length", str(int(last) + 1 - int(first)))
    handler.send_header("Content-Range", f"bytes {first}-{last}/*")
    handler.end_headers()
    handler.wfile.write(bytes(1000) if then is None else b"")
    if then is None:
        return handler.drop()
    time.sleep(then)
    return handler.drop()


def wrong_bytes(handler):
    first, last = handler.headers["Range"].removeprefix("bytes=").split("-")
    return handler.answer(
        206, bytes(int(last) + 1 - int(first)), Content_Range=f"bytes {first}-{last}/*"
    )


def other_range(handler):
    return handler.answer(206, bytes(1000), Content_Range="bytes 5-1004/*")


def whole_file(handler):
    """The answer of a server that knows no ranges."""
    name = handler.path.split("?")[0].rpartition("/")[2]
    return handler.answer(200, HUB.repos[NAME, "main"].files[name].read_bytes())


BEARABLE = {
    "no-ranges": Once("cdn", whole_file, 6),
    "drops-before-answer": Once("cdn", lambda handler: handler.drop(), 20),
    "stalls-before-answer": Once("cdn", lambda handler: time.sleep(0.6) or handler.drop(), 3),
    "stalls-in-body": Once("cdn", lambda handler: partial_body(handler, 0.8), 2),
    "other-range": Once("cdn", other_range, 3),
    "500": Once("cdn", lambda handler: handler.answer(500), 6),
    "429": Once("cdn", lambda handler: handler.answer(429, Retry_After="0"), 6),
    "wrong-bytes-once": Once("cdn", wrong_bytes),
    "api-500": Once("api", lambda handler: handler.answer(500), 2),
    "api-429": Once("api", lambda handler: handler.answer(429, Retry_After="0"), 2),
    "resolve-503": Once("resolve", lambda handler: handler.answer(503), 3),
    "resolve-drops": Once("resolve", lambda handler: handler.drop(), 3),
    "small-drops": Once("small", lambda handler: handler.drop(), 2),
    "redirect-to-third-host": Once(
        "cdn", lambda handler: handler.answer(302, Location=handler.path.replace("?", "?again&")), 9
    ),
}


@pytest.mark.parametrize("name", nth(2, BEARABLE))
def test_bearable_faults(name, served, wanted, tmp_path, monkeypatch):
    fault = BEARABLE[name]
    fault.left = fault.left or 1
    served.faults.append(fault)
    seen = []
    make(tmp_path / "export", arriving=lambda done, total: seen.append((done, total)))
    assert tree(tmp_path / "export") == wanted
    assert fault.left == 0, "the fault happened"
    assert seen[-1][0] == seen[-1][1], "what was thrown away is not counted twice"
    if name != "wrong-bytes-once":
        assert all(later[0] > before[0] - 100_000 for before, later in pairwise(seen)), (
            "no file was thrown away"
        )


def test_address_that_expires_is_asked_for_again(served, wanted, tmp_path):
    def expired(kind, name, handler):
        if kind == "cdn" and handler.headers["Range"] != HEADER_RANGE and name == FIRST:
            served.signature = 1  # what the hub gives out from now on
            return "signature=0" in handler.path and handler.answer(403)
        return False

    served.faults.append(expired)
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_body_that_ends_early_loses_only_what_did_not_come(served, wanted, tmp_path, monkeypatch):
    def cut(handler):
        first, last = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        name = handler.path.split("?")[0].rpartition("/")[2]
        data = served.repos[NAME, "main"].files[name].read_bytes()[first : last + 1]
        handler.send_response(206)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("Content-Range", f"bytes {first}-{last}/*")
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2])
        handler.wfile.flush()
        return handler.drop()

    served.faults.append(Once("cdn", cut, 1, FIRST))
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
    starts = [
        int(one["range"].removeprefix("bytes=").split("-")[0])
        for one in weight_requests(served)
        if one["name"] == FIRST
    ]
    assert [start % PIECE for start in starts if start % PIECE] != [], "it went on inside the piece"


def test_slow_drip_is_a_stall(served, wanted, tmp_path):
    def drip(handler):
        handler.send_response(206)
        first, last = handler.headers["Range"].removeprefix("bytes=").split("-")
        handler.send_header("Content-Length", str(int(last) + 1 - int(first)))
        handler.send_header("Content-Range", f"bytes {first}-{last}/*")
        handler.end_headers()
        path = served.repos[NAME, "main"].files[handler.path.split("?")[0].rpartition("/")[2]]
        for byte in path.read_bytes()[
            int(first) : int(first) + 100
        ]:  # each within the limit of a silent connection
            handler.wfile.write(bytes([byte]))
            time.sleep(0.1)
        return handler.drop()

    served.faults.append(Once("cdn", drip, 1))
    start = time.perf_counter()
    make(tmp_path / "export")
    assert time.perf_counter() - start < 8, "not the ten seconds that the drip takes"
    assert tree(tmp_path / "export") == wanted


UNBEARABLE = {
    "wrong-bytes": ("cdn", wrong_bytes, DownloadError, "have the checksum"),
    "500": (
        "cdn",
        lambda handler: handler.answer(500),
        DownloadError,
        "the server answers 500; gave up after 4 attempts",
    ),
    "429": ("cdn", lambda handler: handler.answer(429), DownloadError, "the server answers 429"),
    "drops": ("cdn", lambda handler: handler.drop(), DownloadError, "the connection"),
    "stalls": ("cdn", lambda handler: time.sleep(0.7) or handler.drop(), DownloadError, "stalled"),
    "longer": (
        "cdn",
        lambda handler: handler.answer(
            206, bytes(100), Content_Range=handler.headers["Range"].replace("=", " ") + "/99999999"
        ),
        DownloadError,
        "'99999999' bytes, the hub promises",
    ),
    "redirects-for-ever": (
        "cdn",
        lambda handler: handler.answer(302, Location=handler.path),
        DownloadError,
        "redirects",
    ),
    "other-size": (
        "small",
        lambda handler: handler.answer(200, b"x", X_Repo_Commit="a" * 40),
        DownloadError,
        "'1' bytes, the hub promises",
    ),
    "other-commit": (
        "small",
        lambda handler: handler.answer(200, b"", X_Repo_Commit="b" * 40),
        DownloadError,
        "answers for commit bbbb",
    ),
    "small-401": (
        "small",
        lambda handler: handler.answer(401, X_Error_Code="RepoNotFound"),
        ConfigError,
        "no model on .* that you may see; check the spelling",
    ),
    "bad-token": (
        "api",
        lambda handler: handler.answer(
            401, X_Error_Message="Invalid credentials in Authorization header"
        ),
        ConfigError,
        "refuses access .401.; the token may be wrong",
    ),
    "small-403": (
        "small",
        lambda handler: handler.answer(403),
        ConfigError,
        "refuses access .403.*hf auth login",
    ),
    "gated": (
        "small",
        lambda handler: handler.answer(403, X_Error_Code="GatedRepo"),
        ConfigError,
        "is gated; ask for access at http.*/org/tiny",
    ),
    "small-404": (
        "small",
        lambda handler: handler.answer(404, X_Error_Code="EntryNotFound"),
        CheckpointError,
        "not there",
    ),
    "resolve-403": (
        "resolve",
        lambda handler: handler.answer(403),
        ConfigError,
        "refuses access .403.*hf auth login",
    ),
    "resolve-404": (
        "resolve",
        lambda handler: handler.answer(404, X_Error_Code="EntryNotFound"),
        CheckpointError,
        "not there",
    ),
    "resolve-500": ("resolve", lambda handler: handler.answer(500), DownloadError, "answers 500"),
    "resolve-other-commit": (
        "resolve",
        lambda handler: handler.answer(200, b"", X_Repo_Commit="b" * 40),
        DownloadError,
        "answers for commit bbbb",
    ),
    "small-500": ("small", lambda handler: handler.answer(500), DownloadError, "answers 500"),
    "api-404": (
        "api",
        lambda handler: handler.answer(404, X_Error_Code="RepoNotFound"),
        ConfigError,
        "no folder here and no model",
    ),
    "api-401": (
        "api",
        lambda handler: handler.answer(401, X_Error_Code="RepoNotFound"),
        ConfigError,
        "no folder here and no model",
    ),
    "api-500": (
        "api",
        lambda handler: handler.answer(500),
        DownloadError,
        "connect to the network",
    ),
    "api-html": (
        "api",
        lambda handler: handler.answer(200, b"<html>Please log in to the hotel"),
        DownloadError,
        "does not answer like a hub",
    ),
    "api-odd": (
        "api",
        lambda handler: handler.answer(200, b'{"id": "x", "sha": "../..", "siblings": []}'),
        DownloadError,
        "is none",
    ),
}


@pytest.mark.parametrize("name", nth(3, UNBEARABLE))
def test_unbearable_faults(name, served, wanted, tmp_path, monkeypatch):
    kind, act, error, message = UNBEARABLE[name]
    served.faults.append(
        lambda asked, file, handler: (
            asked == kind and handler.headers.get("Range") != HEADER_RANGE and act(handler)
        )
    )
    patience = replace(QUICK, stall=10) if name == "redirects-for-ever" else QUICK  # all 20 of them
    with pytest.raises(error, match=message):
        make(tmp_path / "export", patience=patience)
    assert not (tmp_path / "export").exists()
    if name != "wrong-bytes":  # then nothing may be left, or the file that was arriving next
        begun = kind in ("cdn", "resolve")
        assert (tmp_path / "export.download").exists() == begun, "what came can be used"
    served.faults.clear()
    make(tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_unknown_revision(served, tmp_path):
    with pytest.raises(ConfigError, match="no revision 'v9'"):
        make(tmp_path / "export", revision="v9")
    assert list(tmp_path.iterdir()) == []


def test_renamed_repository(served, wanted, tmp_path):
    """The hub redirects the old name to the new one on its own host, and the token may follow
    there."""
    served.repos["old/tiny", "main"] = served.repos["old/tiny", "a" * 40] = served.repos[
        NAME, "main"
    ]

    def renamed(kind, name, handler):
        return (
            handler.path.startswith("/old/")
            and kind != "cdn"
            and handler.answer(307, Location=handler.path.replace("old", "org"))
        )

    served.faults.append(renamed)
    quantize_from_hub("old/tiny", "main", tmp_path / "export", patience=QUICK)
    assert tree(tmp_path / "export") == wanted
