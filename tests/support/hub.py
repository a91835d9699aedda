"""A server on loopback that speaks the hub's protocol, and a second one that stands for its CDN, on
another port.

``faults`` decide what goes wrong: each is called with the request's kind (``api``, ``small``,
``resolve`` for the redirect of a weight file, or ``cdn``), the file's name and the handler, and
returns True if it has answered.
"""

import hashlib
import json
import os
import socket
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

from slotmoe.offload.ingest import repository
from slotmoe.offload.ingest.cached import quantize_from_hub

TOKEN = "hf_secretsecretsecret"
NAME = "org/tiny"


class Repo:
    """One commit of a repository: the files of a folder.  ``sizes`` and ``checksums`` replace what
    is true."""

    def __init__(self, folder, commit="a" * 40):
        self.commit = commit
        self.files = {path.name: path for path in Path(folder).iterdir()}
        self.lfs = {name for name in self.files if name.endswith(".safetensors")}
        self.sizes, self.checksums = {}, {}

    def size(self, name):
        return self.sizes.get(name, self.files[name].stat().st_size)

    def checksum(self, name):
        if name not in self.checksums:
            data = self.files[name].read_bytes()
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data)
            found = hashlib.sha256(data) if name in self.lfs else blob
            self.checksums[name] = found.hexdigest()
        return self.checksums[name]

    def info(self):
        siblings = []
        for name in self.files:
            size, checksum = self.size(name), self.checksum(name)
            siblings.append({"rfilename": name, "size": size, "blobId": checksum})
            if name in self.lfs:
                siblings[-1]["lfs"] = {"sha256": checksum, "size": size, "pointerSize": 134}
        return {"id": "x/y", "sha": self.commit, "siblings": siblings}


class _Server(ThreadingHTTPServer):
    daemon_threads, block_on_close = True, False

    def handle_error(self, request, client_address):
        pass  # clients are killed and hang up


class Hub:
    """Both servers, running until the process ends."""

    def __init__(self):
        servers = [_Server(("127.0.0.1", 0), self._handler(kind)) for kind in ("hub", "cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{one.server_port}" for one in servers)
        self.over = threading.Event()
        self.reset()
        for one in servers:
            threading.Thread(target=one.serve_forever, args=(60,), daemon=True).start()

    def reset(self):
        """Forget repositories, faults and what was asked for."""
        self.over.set()
        self.over = threading.Event()
        self.repos, self.faults, self.requests = {}, [], []
        self.outlasted = 0

    def hold(self, handler):
        """A fault: silence until the test is over, or for the 20 seconds that ``outlasted``
        counts."""
        self.outlasted += not self.over.wait(20)
        return handler.drop()

    def add(self, name, repo, revision="main"):
        self.repos[name, revision] = self.repos[name, repo.commit] = repo

    def asked(self, kind):
        return [one for one in self.requests if one["kind"] == kind]

    def whole(self):
        """The weight files whose data was asked for, in order."""
        return [one["name"] for one in self.asked("cdn") if not one["header"]]

    def _handler(hub, server_kind):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments):
                pass

            def do_GET(self):
                try:
                    hub._serve(self, server_kind)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            do_HEAD = do_GET

            def answer(self, status, body=b"", **headers):
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                return True

            def drop(self):
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return True

        return Handler

    def _serve(self, handler, server_kind):
        path = unquote(handler.path.split("?")[0]).strip("/")
        parts = path.split("/")
        if server_kind == "cdn":
            kind, repo_name, revision, name = "cdn", "/".join(parts[:2]), parts[2], parts[3]
        elif path.startswith("api/models/"):
            kind, repo_name, name = "api", "/".join(parts[2:4]), None
            revision = "/".join(parts[5:]) or "main"
        else:
            repo_name, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            kind = "resolve" if name.endswith(".safetensors") else "small"
        asked = {"header": is_header(handler), "token": handler.headers["Authorization"]}
        self.requests.append({"kind": kind, "name": name, "revision": revision, **asked})
        if any(fault(kind, name, handler) for fault in list(self.faults)):
            return
        repo = self.repos.get((repo_name, revision))
        if repo is None:
            known = any(repo_name == other for other, _ in self.repos)
            handler.answer(404, X_Error_Code="RevisionNotFound" if known else "RepoNotFound")
        elif kind == "api":
            handler.answer(200, json.dumps(repo.info()).encode())
        elif name not in repo.files:
            handler.answer(404, X_Error_Code="EntryNotFound")
        else:
            self._send(handler, kind, repo_name, repo, name)

    def _send(self, handler, kind, repo_name, repo, name):
        if kind != "cdn" and name in repo.lfs:
            place = f"{self.cdn}/{repo_name}/{repo.commit}/{name}?signature=0"
            linked = {"X_Linked_Etag": f'"{repo.checksum(name)}"', "X_Linked_Size": repo.size(name)}
            handler.answer(302, Location=place, X_Repo_Commit=repo.commit, **linked)
            return
        data = repo.files[name].read_bytes()
        headers = {"ETag": f'"{repo.checksum(name)}"', "X_Repo_Commit": repo.commit}
        if span := handler.headers.get("Range"):
            first, last = span.removeprefix("bytes=").split("-")
            size, data = len(data), data[int(first) : int(last) + 1 if last else None]
            headers["Content_Range"] = f"bytes {first}-{int(first) + len(data) - 1}/{size}"
        handler.answer(206 if span else 200, data, **headers)


# One for the whole run.
HUB = Hub()
HOME = tempfile.TemporaryDirectory()
# huggingface_hub reads these when it is imported, which any test may be the first to do.
os.environ |= {
    "HF_ENDPOINT": HUB.endpoint,
    "HF_HOME": HOME.name,
    "HF_TOKEN": TOKEN,
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "NO_PROXY": "127.0.0.1",
}


def hurried(monkeypatch):
    """Nobody waits long for what goes wrong on purpose."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(repository, "ATTEMPTS", 3)
    monkeypatch.setattr(repository, "PAUSE", 0.01)


def make(destination, revision="main", **options):
    return quantize_from_hub(NAME, revision, destination, **options)


def fill_cache(names):
    """What huggingface_hub keeps of earlier downloads; returns the folder."""
    from huggingface_hub import constants, hf_hub_download

    for name in names:
        hf_hub_download(NAME, name, cache_dir=constants.HF_HUB_CACHE)
    return Path(constants.HF_HUB_CACHE)


def is_header(handler):
    """Whether a request is for the beginning of a weight file."""
    return handler.headers.get("Range", "").startswith("bytes=0-")


# Faults


def answer(*arguments, **headers):
    return lambda handler: handler.answer(*arguments, **headers)


def data_of(handler):
    name = handler.path.split("?")[0].rpartition("/")[2]
    return HUB.repos[NAME, "main"].files[name].read_bytes()


def wrong_bytes(handler):
    return handler.answer(200, bytes(len(data_of(handler))))


def too_many(handler):
    return handler.answer(200, data_of(handler) + bytes(1 << 20))


def faulty(served, kind, act, times=1 << 30):
    """What such requests get; returns how often they still may."""
    left, lock = [times], threading.Lock()

    def fault(asked, name, handler):
        asked = "header" if asked == "cdn" and is_header(handler) else asked
        with lock:
            if asked != kind or not left[0]:
                return False
            left[0] -= 1
        return act(handler)

    served.faults.append(fault)
    return left
