"""A server on loopback that speaks the hub's protocol, and a second one that stands for its CDN, on
another port.

``faults`` decide what goes wrong: each is called with the request's kind (``api``, ``head``,
``small``, ``resolve`` for the redirect of a weight file, or ``cdn``), the file's name and the
handler, and returns True if it has answered.
"""

import hashlib
import json
import socket
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from slotmoe.offload.ingest.hub import quantize_from_hub
from slotmoe.offload.ingest.repository import Patience

TOKEN = "hf_secretsecretsecret"
NAME = "org/tiny"
QUICK = Patience(stall=30, attempts=4, pause=0.01)
HEADER_RANGE = "bytes=0-65535"


class Repo:
    """One commit of a repository: the files of a folder.  ``sizes`` and ``checksums`` replace what
    is true."""

    def __init__(self, folder, commit="a" * 40):
        self.commit = commit
        self.files = {path.name: path for path in Path(folder).iterdir()}
        self.lfs = {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in self.files.items()
            if path.suffix == ".safetensors"
        }
        self.sizes, self.checksums = {}, {}

    def size(self, name):
        return self.sizes.get(name, self.files[name].stat().st_size)

    def checksum(self, name):
        if name in self.checksums:
            return self.checksums[name]
        data = b"" if name in self.lfs else self.files[name].read_bytes()
        return self.lfs.get(name) or hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def info(self):
        siblings = []
        for name in self.files:
            one = {"rfilename": name, "size": self.size(name), "blobId": self.checksum(name)}
            if name in self.lfs:
                lfs = {"sha256": one["blobId"], "size": one["size"], "pointerSize": 134}
                one |= {"blobId": "0" * 40, "lfs": lfs}
            siblings.append(one)
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
            threading.Thread(target=one.serve_forever, args=(0.05,), daemon=True).start()

    def reset(self):
        """Forget repositories, faults and what was asked for."""
        self.over.set()
        self.over = threading.Event()
        self.repos, self.faults, self.requests = {}, [], []
        self.outlasted = self.signature = 0

    def hold(self, handler):
        """A fault: silence until the test is over, or for the 20 seconds that ``outlasted``
        counts."""
        self.outlasted += not self.over.wait(20)
        return handler.drop()

    def add(self, name, repo, revision="main"):
        self.repos[name, revision] = self.repos[name, repo.commit] = repo

    def asked(self, kind, name=None):
        return [one for one in self.requests if one["kind"] == kind and name in (None, one["name"])]

    def _handler(hub, server_kind):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_arguments):
                pass

            def do_HEAD(self):
                self.handle_request()

            def do_GET(self):
                self.handle_request()

            def handle_request(self):
                try:
                    hub._serve(self, server_kind)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

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
            kind = "head" if handler.command == "HEAD" else kind
        asked = {"kind": kind, "name": name, "revision": revision}
        asked |= {"range": handler.headers["Range"], "token": handler.headers["Authorization"]}
        self.requests.append(asked)
        if any(fault(kind, name, handler) for fault in list(self.faults)):
            return
        if not any(known == repo_name for known, _ in self.repos):
            handler.answer(404, X_Error_Code="RepoNotFound")
        elif (repo_name, revision) not in self.repos:
            handler.answer(404, X_Error_Code="RevisionNotFound")
        elif kind == "api":
            handler.answer(200, json.dumps(self.repos[repo_name, revision].info()).encode())
        elif name not in self.repos[repo_name, revision].files:
            handler.answer(404, X_Error_Code="EntryNotFound")
        else:
            self._send(handler, kind, repo_name, self.repos[repo_name, revision], name)

    def _send(self, handler, kind, repo_name, repo, name):
        if kind != "cdn" and name in repo.lfs:
            place = f"{self.cdn}/{repo_name}/{repo.commit}/{name}?signature={self.signature}"
            linked = {"X_Linked_Etag": f'"{repo.checksum(name)}"', "X_Linked_Size": repo.size(name)}
            handler.answer(302, Location=place, X_Repo_Commit=repo.commit, **linked)
            return
        size = repo.files[name].stat().st_size
        span = handler.headers.get("Range")
        start, stop = 0, size
        if span:
            first, last = span.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else size, size)
        with open(repo.files[name], "rb") as file:
            file.seek(start)
            data = file.read(stop - start)
        headers = {"ETag": f'"{repo.checksum(name)}"', "X_Repo_Commit": repo.commit}
        if span:
            headers["Content_Range"] = f"bytes {start}-{stop - 1}/{size}"
        handler.answer(206 if span else 200, data, **headers)


# One for the whole run: huggingface_hub reads its endpoint only when it is imported.
HUB = Hub()
HOME = tempfile.TemporaryDirectory()


def make(destination, **options):
    options = {"patience": QUICK, **options}
    return quantize_from_hub(NAME, options.pop("revision", "main"), destination, **options)


def weight_requests(hub):
    return [one for one in hub.asked("cdn") if one["range"] != HEADER_RANGE]
