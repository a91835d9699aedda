"""The files of a model on the hub, one weight file ahead of the work on them.

Metadata, tokens, endpoint, cache, HTTP and Xet are huggingface_hub's.  A file counts when it has
the checksum that the hub gave for the commit, wherever it came from.  ``DST.download`` holds

    plan.json        repository, revision, commit, and the size and checksum of each file, signed
    headers/NAME/    the small files, and sparse files with each weight file's header and size
    weights/         weight files: those that are being quantized, and the one that arrives

``headers/NAME`` is thus a checkpoint whose tensors can be checked before weights are fetched.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from slotmoe import system
from slotmoe.errors import CheckpointError, DownloadError, ExportError, informs
from slotmoe.model import tiktoken
from slotmoe.model.checkpoint import shards
from slotmoe.model.checkpoint.reader import Checkpoint
from slotmoe.model.checkpoint.shards import INDEX_NAME, MAX_HEADER_BYTES
from slotmoe.model.config import read_config
from slotmoe.offload.ingest.output_dir import Notify, Progress, Stopped, ignore
from slotmoe.offload.ingest.repository import PassingError, Snapshot, asked
from slotmoe.quant.codecs.encode import Hessian
from slotmoe.quant.export.layout import COPIED
from slotmoe.quant.export.manifest import MAX_COPIED_BYTES
from slotmoe.sizes import format_size

T = TypeVar("T")
_HEAD_BYTES = 64 << 10  # holds most headers; a longer one takes a second request
_HEADERS = 8  # that are asked for at once


def _arrived_in(result: "AsyncResult[T]") -> T:
    """What a thread of a pool made.  A signal that strikes just before Python waits for a lock does
    not end that wait, so no wait is long."""
    while not result.ready():
        result.wait(0.5)
    return result.get()


class Portion(NamedTuple):
    """A part of the work: the weight ``files`` that it reads, the tensors that it writes, and what
    comes before them, which gives these tensors' Hessians."""

    files: set[str]
    names: list[str]
    prepare: Callable[[], Mapping[str, Hessian]] = dict


def _uses(portions: Sequence[Portion]) -> dict[str, tuple[int, int]]:
    """The first and the last portion that reads a file."""
    uses: dict[str, tuple[int, int]] = {}
    for at, portion in enumerate(portions):
        uses |= {file: (uses.get(file, (at, at))[0], at) for file in portion.files}
    return uses


class Shards:
    """The weight files of one commit, in the folder ``download`` while they are needed, or for good
    in ``kept``.  ``arriving`` gets bytes of weight files, ``notify`` sentences.  ``close`` stops
    what arrives."""

    def __init__(
        self,
        snapshot: Snapshot,
        download: Path,
        kept: Path | None = None,
        arriving: Progress = ignore,
        notify: Notify = ignore,
    ):
        self.snapshot, self._kept = snapshot, kept
        self._arriving, self._notify = informs(arriving), informs(notify)
        self._weights = kept or download / "weights"
        self.folder = download / "headers" / snapshot.repo.rpartition("/")[2]
        self._done, self._total = 0, 0
        self._stop = threading.Event()
        # These threads end with the process at the latest, so no silent server holds Ctrl-C up.
        self._headers = ThreadPool(_HEADERS)
        self._arrivals = ThreadPool(1)
        self._coming: dict[str, AsyncResult[Any]] = {}

    def close(self) -> None:
        """Give up the files that arrive now: a download sees this when its next bytes come."""
        self._stop.set()
        patience = time.monotonic() + 1
        for result in self._coming.values():
            result.wait(max(0.0, patience - time.monotonic()))
        self._headers.terminate()
        self._arrivals.terminate()

    def stamps(self, files: Iterable[str]) -> dict[str, str]:
        """The hub's checksums of weight files, by which they are known without reading."""
        return {file: f"hub {self.snapshot.files[file].checksum}" for file in files}

    def tidy(self) -> None:
        """Remove what is huggingface_hub's: of a run that was killed, half files too."""
        for folder in (self.folder, self._weights):
            with suppress(FileNotFoundError):
                shutil.rmtree(folder / ".cache")

    def prepare(self) -> None:
        """Fetch everything but weights, so that ``folder`` can be opened as a checkpoint.

        Raises ``ConfigError`` or ``CheckpointError`` for what is unsupported or incomplete.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tidy()
        files, at = self.snapshot.files, f"{self.snapshot.repo}: "
        commit = self.snapshot.commit[:12]
        if "config.json" not in files:
            problem = f"has no config.json at {commit}; not a model in Hugging Face's format"
            raise CheckpointError(at + problem)
        self._fetch_small("config.json", MAX_COPIED_BYTES)
        read_config(self.folder / "config.json")
        for name in COPIED[1:]:
            self._fetch_small(name, MAX_COPIED_BYTES)
        if "tokenizer.json" not in files:
            self._fetch_small(tiktoken.FILE_NAME, tiktoken.MAX_BYTES)
        self._fetch_small(INDEX_NAME, shards.MAX_INDEX_BYTES)
        weight_map = shards.weight_files(self.folder) or {"": shards.SINGLE_NAME}
        names = list(dict.fromkeys(weight_map.values()))
        if missing := [name for name in names if name not in files]:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            count = f"{len(missing)} of {len(names)} weight files can't be had at {commit}"
            rule = "without a network all must be in huggingface_hub's cache"
            problem = f"{count}: {', '.join(missing[:5])}{more}; {rule}"
            raise CheckpointError(f"{at}{problem}, and weights must be .safetensors")
        for name in names:
            self._coming[name] = self._headers.apply_async(self._fetch_header, (name,))
        for name in names:
            _arrived_in(self._coming[name])

    def _fetch_small(self, name: str, limit: int) -> None:
        path, expected = self.folder / name, self.snapshot.files.get(name)
        if expected is None:
            return
        if expected.size > limit:
            sizes = f"{expected.size} bytes, more than {limit}"
            raise CheckpointError(f"{self.snapshot.repo}/{name}: {sizes}; not a real model's file")
        found = self._checked(name, path, self.snapshot.cached(name))
        if found is None:
            self._fetch(name, path)
        elif found != path:
            copy(found, path)

    def _fetch_header(self, name: str) -> None:
        """Make a sparse file with a weight file's size and header, anew: no checksum is known."""
        path, size = self.folder / name, self.snapshot.files[name].size
        data = self._beginning(name, min(_HEAD_BYTES, size))
        length = 8 + int.from_bytes(data[:8], "little")
        if length > MAX_HEADER_BYTES:
            sizes = f"header of {length} bytes, more than {MAX_HEADER_BYTES}"
            raise CheckpointError(f"{self.snapshot.repo}/{name}: {sizes}; not a real checkpoint")
        if length > len(data):
            data = self._beginning(name, min(length, size))
        temporary = path.with_name(name + ".tmp")
        with open(temporary, "wb") as file:
            system.keep_sparse(file.fileno())
            file.write(data[:length])
            file.truncate(size)
        if system.bytes_on_disk(temporary) > max(size // 2, length + (1 << 20)):
            system.patiently(temporary.unlink)
            problem = "the file system keeps no sparse files; choose a destination on another"
            raise ExportError(f"{path.parent}: {problem}")
        system.move(temporary, path)

    def _beginning(self, name: str, size: int) -> bytes:
        """The first bytes of a weight file, from huggingface_hub's cache if it is there."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        if (cached := self.snapshot.cached(name)) is not None:
            with open(cached, "rb") as file:
                return file.read(size)
        repo, commit = self.snapshot.repo, self.snapshot.commit
        span = {"Range": f"bytes=0-{size - 1}", "Accept-Encoding": "identity"}

        def ask() -> bytes:
            url, data = hf_hub_url(repo, name, revision=commit), bytearray()
            headers = build_hf_headers(library_name="slotmoe", headers=span)
            seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
            with get_session().stream("GET", url, headers=headers, timeout=seconds) as response:
                hf_raise_for_status(response)
                for chunk in response.iter_raw():  # of a server that knows no ranges, no more
                    data += chunk[: size - len(data)]
                    if len(data) == size:
                        return bytes(data)
            raise PassingError(f"the connection ended at byte {len(data)}")

        return asked(ask, repo, commit, name, self._stop)

    def _fetch(self, name: str, path: Path, advance: Callable[[int], None] = ignore) -> None:
        """Download a file, and make it durable.  ``advance`` gets counts of bytes that arrive and,
        negative, that are thrown away.  Raises ``DownloadError``, ``ConfigError`` or
        ``CheckpointError``."""
        from huggingface_hub import hf_hub_download

        repo, commit = self.snapshot.repo, self.snapshot.commit
        expected, got, checksum = self.snapshot.files[name], 0, ""

        def arrived(count: int) -> None:
            nonlocal got
            if self._stop.is_set():
                raise Stopped
            if (got := got + count) > expected.size:
                sizes = f"more bytes than the {expected.size} that the hub promises"
                raise DownloadError(f"{repo}/{name}: the server sends {sizes}; try again later")
            advance(count)

        def ask() -> None:
            nonlocal got
            advance(-got)
            got = 0
            options: Any = {"revision": commit, "local_dir": path.parent, "force_download": True}
            options |= {"library_name": "slotmoe", "tqdm_class": bar(arrived)}
            hf_hub_download(repo, name, **options)

        for _ in range(2):  # a wrong checksum may be one bad transfer, twice is a bad file
            asked(ask, repo, commit, name, self._stop)
            with open(path, "r+b") as file:
                if (checksum := expected.checksum_of(file)) == expected.checksum:
                    os.fsync(file.fileno())
                    return
            system.patiently(path.unlink)
        sums = f"the server's bytes have the checksum {checksum}, the hub promises"
        what = f"{repo}/{name}: {sums} {expected.checksum}"
        raise DownloadError(f"{what}; they were thrown away, try again later")

    def _checked(self, name: str, *places: Path | None) -> Path | None:
        """The first place that has a file with the checksum of the file ``name``."""
        expected = self.snapshot.files[name]
        for path in (place for place in places if place is not None and place.is_file()):
            with open(path, "rb") as file:
                if expected.checksum_of(file) == expected.checksum:
                    return path
            self._notify(f"{path}: is damaged, so it is not used but downloaded again")
        return None

    def _arrived(self, name: str) -> Path | None:
        """A weight file that came in an earlier run."""
        path, size = self._weights / name, self.snapshot.files[name].size
        return path if path.is_file() and path.stat().st_size == size else None

    def announce(self, portions: Sequence[Portion], export_bytes: int, free_bytes: int) -> int:
        """Say what will come; returns the bytes that weight files take on the disk at their peak
        beyond what is taken already."""
        files = {file for portion in portions for file in portion.files}
        self._weights.mkdir(exist_ok=True)
        for path in [] if self._kept else list(self._weights.iterdir()):
            if path.name not in files:
                system.patiently(path.unlink)  # it was done when the last run was killed
        snapshot, size = self.snapshot, format_size
        coming = [name for name in files if not (self._arrived(name) or snapshot.cached(name))]
        sizes = {name: snapshot.files[name].size for name in coming}
        self._total = sum(sizes.values())
        at_once = [0] * len(portions)  # on the disk, also those of the next portion, which arrive
        for file, (first, last) in _uses(portions).items():
            for portion in range(max(0, first - 1), last + 1):
                at_once[portion] += sizes.get(file, 0)
        peak = max(at_once, default=0) if self._kept is None else self._total
        if files:
            kept = "" if self._kept is None else f" and the weight files in {self._kept}"
            count = f"{len(coming)} of {len(files)} weight files"
            at, total = snapshot.commit[:12], f"{count} to download, {size(self._total)}"
            self._notify(f"{snapshot.repo} at commit {at}: {total}")
            needs = f"{size(export_bytes)} for the export and at most {size(peak)} for weight files"
            left = f"{size(free_bytes)} free; afterwards the export remains{kept}"
            self._notify(f"disk: {needs}, {left}")
        return peak

    def held(
        self, checkpoint: Checkpoint, portions: Sequence[Portion]
    ) -> Generator[Portion, None, None]:
        """Each portion while ``checkpoint`` can read its files and those of the next arrive."""
        uses, there = _uses(portions), dict[str, tuple[Path, ExitStack]]()
        ahead = [*portions, Portion(set(), [])]
        with ExitStack() as closing:
            for at, portion in enumerate(ahead):
                for file in [file for file in there if uses[file][1] < at]:
                    path, reading = there.pop(file)
                    reading.close()
                    if self._kept is not None and path.parent != self._kept:
                        copy(path, self._kept / file)
                    elif path.parent == self._weights and self._kept is None:
                        system.patiently(path.unlink)
                if at == 0:
                    self._begin(portion.files)
                for file in sorted(portion.files - there.keys()):
                    path = _arrived_in(self._coming[file])
                    reading = closing.enter_context(ExitStack())
                    reading.enter_context(checkpoint.read_from(file, path))
                    there[file] = path, reading
                if at < len(portions):
                    self._begin(ahead[at + 1].files - there.keys())
                    yield portion

    def _begin(self, files: set[str]) -> None:
        for name in sorted(files):
            self._coming[name] = self._arrivals.apply_async(self._arrive, (name,))

    def _arrive(self, name: str) -> Path:
        places = self._arrived(name), self.snapshot.cached(name)
        if (path := self._checked(name, *places)) is None:
            path = self._weights / name
            self._fetch(name, path, self._advance)
        with open(path, "rb") as whole, open(self.folder / name, "rb") as header:
            length = 8 + int.from_bytes(whole.read(8), "little")
            whole.seek(0)
            if whole.read(length) != header.read(length):
                problem = "the header that came before is not the one of the whole file"
                raise DownloadError(f"{self.snapshot.repo}/{name}: {problem}; try again")
        return path

    def _advance(self, count: int) -> None:
        self._done += count
        self._arriving(self._done, max(self._total, self._done))


def bar(arrived: Callable[[int], None]) -> type:
    """What huggingface_hub takes for a class of tqdm's; both HTTP and Xet tell it of bytes."""

    class Bar(AbstractContextManager["Bar"]):
        def __init__(self, **_shown: object):
            pass

        def update(self, count: int = 1) -> None:
            arrived(count)

        def close(self, *_shown: object, **_how: object) -> None:
            pass

        __exit__ = update_transfer = set_postfix_str = set_transfer_postfix_str = close

    return Bar


def copy(source: Path, destination: Path) -> None:
    """``destination`` appears when it is whole; big files are linked if they can be."""
    temporary = destination.with_name(destination.name + ".tmp")
    system.patiently(temporary.unlink, True)
    try:
        os.link(os.path.realpath(source), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    system.move(temporary, destination)
