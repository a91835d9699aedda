"""Download speed beside curl's: one file from a server on loopback.

curl neither checks nor syncs what it writes, so the same work is measured too: curl, then sha256sum
and sync.  Of slotmoe, ``arrived`` ends when the last byte has come.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import tempfile
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import get_context
from pathlib import Path
from socket import create_server, socket
from urllib.request import Request, urlopen

import click

from slotmoe.offload.ingest.download import fetch
from slotmoe.offload.ingest.repository import Expected, Patience, Remote
from slotmoe.tools.bench import turns


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    file: Path

    def log_message(self, *_arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        size, span = self.file.stat().st_size, self.headers.get("Range")
        first, _, last = (span or "bytes=0-").removeprefix("bytes=").partition("-")
        start, stop = int(first), int(last) + 1 if last else size
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        with open(self.file, "rb") as file:
            self.connection.sendfile(file, start, stop - start)


def _serve(file: Path, listener: socket) -> None:
    _Handler.file = file
    server = ThreadingHTTPServer(listener.getsockname(), _Handler, bind_and_activate=False)
    server.socket = listener
    server.serve_forever()


def _curl(url: str, path: Path, checked: bool) -> float:
    subprocess.run(["sync"], check=True)
    copy = str(path)
    commands = [["curl", "-s", "-o", copy, url], ["sha256sum", copy], ["sync", copy]]
    started = time.perf_counter()
    for command in commands if checked else commands[:1]:
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _slotmoe(remote: Remote, path: Path, checked: bool) -> float:
    path.unlink(missing_ok=True)
    subprocess.run(["sync"], check=True)
    arrived, started = [0.0], time.perf_counter()

    def advance(_count: int) -> None:
        arrived[0] = time.perf_counter() - started

    asyncio.run(fetch(remote, path, advance))
    return time.perf_counter() - started if checked else arrived[0]


@click.command()
@click.option("--gigabytes", type=float, default=2.0, help="Size of the file, in 10^9 bytes.")
@turns.repetitions(5)
@click.option("--directory", help="Where to write. [default: a temporary folder]")
def download(gigabytes: float, repetitions: int, directory: str | None) -> None:
    """Print the seconds of each way, its MB a second, and its ratio to plain curl."""
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        source, path = Path(folder, "source"), Path(folder, "copy")
        digest, size = hashlib.sha256(), int(gigabytes * 1e9)
        with open(source, "wb") as file:
            for start in range(0, size, 16 << 20):
                block = os.urandom(min(size - start, 16 << 20))
                digest.update(block)
                file.write(block)
        with create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            child = get_context("spawn").Process(target=_serve, args=(source, listener))
            child.start()
        expected = Expected(size, digest.hexdigest())
        remote = Remote("loopback", "0" * 40, "file", expected, url, Patience())
        ways = {
            "curl": partial(_curl, url, path, False),
            "curl, checked and durable": partial(_curl, url, path, True),
            "slotmoe, arrived": partial(_slotmoe, remote, path, False),
            "slotmoe, checked and durable": partial(_slotmoe, remote, path, True),
        }
        try:
            urlopen(Request(url, headers={"Range": "bytes=0-0"})).close()  # it serves from here on
            rows = turns.compare(ways, repetitions, "curl", "seconds")
        finally:
            child.terminate()
            child.join()
    for row in rows:
        row["megabytes_per_second"] = round(size / 1e6 / row["seconds"])
    turns.finish(rows)
