"""Download speed of ``slotmoe.offload.ingest.download`` beside curl's: one file from a server on
loopback, in turn, medians.

curl neither checks nor syncs what it writes, so the same work is measured too: curl, then sha256sum
and sync.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import click

from slotmoe.offload.ingest.download import fetch
from slotmoe.offload.ingest.http import Expected, Remote


class _Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    file = Path()

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
            while start < stop:
                start += os.sendfile(
                    self.connection.fileno(), file.fileno(), start, min(stop - start, 16 << 20)
                )


@click.command()
@click.option(
    "--gigabytes",
    type=float,
    default=2.0,
    show_default=True,
    help="Size of the file, in 10^9 bytes.",
)
@click.option("--repetitions", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    help="Where to write. [default: a temporary folder]",
)
@click.option("--serve", type=click.Path(path_type=Path), hidden=True)
def command(gigabytes: float, repetitions: int, directory: Path | None, serve: Path | None) -> None:
    """Compare with curl on this machine.

    \b
    Example:
      python -m slotmoe.tools.bench.download --gigabytes 2
    """
    if serve is not None:
        _Server.file = serve
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
        print(server.server_port, flush=True)
        server.serve_forever()
    work = Path(tempfile.mkdtemp(dir=directory))
    try:
        source, digest, left = work / "source", hashlib.sha256(), int(gigabytes * 1e9)
        with open(source, "wb") as file:
            while left:
                piece = os.urandom(min(left, 16 << 20))
                digest.update(piece)
                file.write(piece)
                left -= len(piece)
        child = subprocess.Popen(
            [sys.executable, "-m", "slotmoe.tools.bench.download", "--serve", str(source)],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert child.stdout is not None
            url = f"http://127.0.0.1:{int(child.stdout.readline())}/file"
            expected = Expected(source.stat().st_size, digest.hexdigest())
            print(json.dumps(_measure(url, expected, work, repetitions)))
        finally:
            child.terminate()
            child.wait()
    finally:
        shutil.rmtree(work)


def _measure(url: str, expected: Expected, work: Path, repetitions: int) -> dict[str, object]:
    seconds: dict[str, list[float]] = {}

    def note(name: str, start: float) -> None:
        seconds.setdefault(name, []).append(time.perf_counter() - start)

    for _ in range(repetitions):
        os.sync()
        start = time.perf_counter()
        subprocess.run(["curl", "-s", "-o", work / "curl", url], check=True)
        note("curl", start)
        subprocess.run(["sha256sum", work / "curl"], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["sync", work / "curl"], check=True)
        note("curl, checked and durable", start)
        (work / "curl").unlink()
        os.sync()
        arrived, start = 0, time.perf_counter()

        def advance(count: int, start: float = start) -> None:
            nonlocal arrived
            arrived += count
            if arrived == expected.size:
                note("slotmoe", start)

        remote = Remote("file", expected, lambda: url, lambda url: {})
        fetch(remote, work / "slotmoe", threading.Event(), advance)
        note("slotmoe, checked and durable", start)
        (work / "slotmoe").unlink()
    speeds = {
        name: round(expected.size / 1e6 / statistics.median(times))
        for name, times in seconds.items()
    }
    return {
        "megabytes_per_second": speeds,
        "seconds": {name: [round(one, 2) for one in times] for name, times in seconds.items()},
    }


if __name__ == "__main__":
    command()
