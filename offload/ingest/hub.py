"""A model on the hub as the source of an export, one weight file at a time.

The revision is resolved once, and everything comes from that commit.  ``DST.download`` holds what
has come:

    plan.json            repository, revision, commit, and the size and checksum of each file
    headers/NAME/        the small files, and each weight file's header in a sparse file of its full size
    weights/             at most two weight files, one being quantized and one arriving

``headers/NAME`` is thus a checkpoint folder whose tensors can be checked before any weight is
fetched.  Metadata, tokens, endpoint and cache are huggingface_hub's; the bytes come through
``slotmoe.offload.ingest.download``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from slotmoe.errors import CheckpointError, ConfigError, DownloadError, ExportError
from slotmoe.model.checkpoint import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    MAX_INDEX_BYTES,
    SINGLE_NAME,
    weight_files,
)
from slotmoe.model.config import read_config
from slotmoe.offload.ingest.download import (
    CONNECTIONS,
    Ending,
    Expected,
    PassingError,
    Patience,
    Stopped,
    fetch,
    patiently,
    read_range,
    status_error,
)
from slotmoe.offload.ingest.hub_id import require_hub_library
from slotmoe.offload.ingest.output_dir import full_disk_explained, locked, partial_folder
from slotmoe.offload.ingest.quantize import Progress, quantize
from slotmoe.offload.plan.memory import format_size
from slotmoe.quant.export.layout import COPIED, FORMAT_VERSION, MANIFEST
from slotmoe.quant.export.validate import MAX_COPIED_BYTES
from slotmoe.quant.export.writer import write_json

_HEAD_BYTES = 64 << 10  # holds most headers; the rest of a longer one takes a second request
_RESOLVING = Patience(attempts=3)
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Pin:
    """One commit of a repository, and what is in it that an export can be made of."""

    repo: str
    revision: str
    commit: str
    files: dict[str, Expected]


def resolve(repo: str, revision: str) -> Pin:
    """The commit that ``revision`` is now.  Without a network, the one that huggingface_hub's cache
    holds.

    Raises ``ConfigError`` if there is no such model or access to it, ``DownloadError`` if the hub
    can't be asked.
    """
    require_hub_library()
    from huggingface_hub import HfApi

    def ask() -> Any:
        with hub_errors(repo, revision):
            return HfApi(library_name="slotmoe").model_info(
                repo, revision=revision, files_metadata=True, timeout=30
            )

    try:
        info = patiently(ask, repo, _RESOLVING, threading.Event())
    except DownloadError as problem:
        cached = _cached_pin(repo, revision)
        if cached is None:
            raise DownloadError(
                f"{problem}; huggingface_hub's cache holds nothing of it either, so connect to the network"
            ) from None
        return cached
    files = {}
    for sibling in info.siblings or []:
        checksum = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
        sound = (
            isinstance(sibling.size, int)
            and sibling.size >= 0
            and re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", str(checksum))
        )
        if _is_part(sibling.rfilename) and sound:
            files[sibling.rfilename] = Expected(sibling.size, str(checksum))
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise DownloadError(
            f"{repo}: the hub answers with the commit {info.sha!r:.60}, which is none; is HF_ENDPOINT right?"
        )
    return Pin(repo, revision, info.sha, files)


def _is_part(name: str) -> bool:
    return (
        name in COPIED or name == INDEX_NAME or ("/" not in name and name.endswith(".safetensors"))
    )


def _cached_pin(repo: str, revision: str) -> Pin | None:
    """What huggingface_hub's cache holds of ``revision``; its links lead to blobs that are named by
    their checksums."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    files = {}
    for path in Path(config).parent.iterdir():
        blob = Path(os.path.realpath(path))
        if (
            _is_part(path.name)
            and blob.is_file()
            and re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", blob.name)
        ):
            files[path.name] = Expected(blob.stat().st_size, blob.name)
    return Pin(repo, revision, Path(config).parent.name, files)


@contextmanager
def hub_errors(repo: str, revision: str) -> Iterator[None]:
    """huggingface_hub's errors as ours: what the user can do about it, or ``PassingError``."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{repo}"
        raise ConfigError(
            f"{repo}: is gated; ask for access at {page}, then log in with 'hf auth login' or set HF_TOKEN"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ConfigError(
            f"{repo}: is no folder here and no model on {constants.ENDPOINT} that you may see; check the spelling, and if it is"
            " private, log in with 'hf auth login' or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise ConfigError(
            f"{repo}: has no revision {revision!r:.80}; --revision takes a branch, a tag or a commit"
        ) from None
    except errors.EntryNotFoundError:
        raise CheckpointError(
            f"{repo}: a file that its index names is not there at {revision:.80}; the repository is incomplete"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise DownloadError(f"{repo}: HF_HUB_OFFLINE forbids to ask the hub") from None
    except errors.HfHubHTTPError as problem:
        status = problem.response.status_code
        if status in (401, 403):
            raise ConfigError(
                f"{repo}: {constants.ENDPOINT} refuses access ({status}); the token may be wrong or lack the permission:"
                " log in with 'hf auth login' or set HF_TOKEN"
            ) from None
        if status in (408, 429) or status >= 500:
            raise status_error(status, problem.response.headers) from None
        raise DownloadError(
            f"{repo}: {constants.ENDPOINT} answers {status}, which no hub should; is HF_ENDPOINT right?"
        ) from None
    except errors.HFValidationError:
        raise ConfigError(
            f"{repo}: is no folder here and no name that a model on the hub can have; check the spelling"
        ) from None
    except (errors.HTTPError, OSError) as problem:  # type: ignore[attr-defined]  # its HTTP client's, whichever that is
        raise PassingError(
            f"{constants.ENDPOINT} can't be reached ({str(problem)[:120] or type(problem).__name__})"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise PassingError(
            f"{constants.ENDPOINT} does not answer like a hub ({type(problem).__name__})"
        ) from None


class _RemoteFile:
    """One file of the commit, as ``slotmoe.offload.ingest.download`` wants it."""

    def __init__(self, pin: Pin, name: str):
        self.name = f"{pin.repo}/{name}"
        self._pin, self._file, self._lock = pin, name, threading.Lock()
        self._url: str | None = None

    def locate(self) -> str:
        with self._lock:
            if self._url is None:
                self._url = self._ask()
            return self._url

    def forget(self) -> None:
        with self._lock:
            self._url = None

    def headers(self, url: str) -> dict[str, str]:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        ours, hub = urlsplit(url), urlsplit(constants.ENDPOINT)
        at_hub = (ours.scheme, ours.netloc) == (hub.scheme, hub.netloc)
        return build_hf_headers(library_name="slotmoe", token=None if at_hub else False)

    def _ask(self) -> str:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        pin, expected = self._pin, self._pin.files[self._file]
        url = hf_hub_url(pin.repo, self._file, revision=pin.commit)
        with hub_errors(pin.repo, pin.commit):
            found = get_hf_file_metadata(url, library_name="slotmoe")
        if found.commit_hash not in (None, pin.commit):
            raise DownloadError(
                f"{self.name}: the hub answers for commit {found.commit_hash} instead of {pin.commit}; try again later"
            )
        etag = found.etag or ""
        other = (
            re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", etag)
            and len(etag) == len(expected.checksum)
            and etag != expected.checksum
        )
        if found.size not in (None, expected.size) or other:
            raise DownloadError(
                f"{self.name}: is {found.size} bytes with checksum {etag:.64} now, the hub promised {expected.size} bytes with"
                f" {expected.checksum}; pass --overwrite to start anew"
            )
        return urljoin(url, found.location)


class HubShards:
    """The weight files of one commit (``slotmoe.offload.ingest.quantize.Shards``): the next arrives
    while one is quantized."""

    def __init__(
        self,
        pin: Pin,
        download: Path,
        kept: Path | None,
        arriving: Progress,
        notify: Notify,
        patience: Patience,
    ):
        self._pin, self._weights, self._kept = pin, download / "weights", kept
        self._arriving, self._notify, self._patience = arriving, notify, patience
        self.folder = download / "headers" / pin.repo.rpartition("/")[2]
        self.stop, self._lock = Ending(), threading.Lock()
        self._done, self._total = 0, 0

    def prepare(self) -> None:
        """Fetch everything but weights, so that ``folder`` can be opened as a checkpoint.

        Raises ``ConfigError`` or ``CheckpointError`` for what is unsupported or incomplete.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._weights.mkdir(exist_ok=True)
        pin = self._pin
        if "config.json" not in pin.files:
            raise CheckpointError(
                f"{pin.repo}: has no config.json at {pin.commit[:12]}; not a model in Hugging Face's format"
            )
        self._bring_small("config.json", MAX_COPIED_BYTES)
        read_config(self.folder / "config.json")
        for name in (*COPIED[1:], INDEX_NAME):
            if name in pin.files:
                self._bring_small(name, MAX_INDEX_BYTES if name == INDEX_NAME else MAX_COPIED_BYTES)
        weight_map = weight_files(self.folder)
        names = (
            list(dict.fromkeys(weight_map.values())) if weight_map is not None else [SINGLE_NAME]
        )
        missing = [name for name in names if name not in pin.files]
        if missing:
            some = ", ".join(missing[:5]) + (
                f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            )
            raise CheckpointError(
                f"{pin.repo}: {len(missing)} of {len(names)} weight files can't be had at {pin.commit[:12]}: {some}; without a network"
                " all must be in huggingface_hub's cache, and weights must be .safetensors"
            )
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            try:
                for future in [pool.submit(self._bring_header, name) for name in names]:
                    future.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _bring_small(self, name: str, limit: int) -> None:
        path, expected = self.folder / name, self._pin.files[name]
        if expected.size > limit:
            raise CheckpointError(
                f"{self._pin.repo}/{name}: {expected.size} bytes, more than {limit}; not a real model's file"
            )
        if path.exists():
            return
        cached = self._cached(name, check=True)
        if cached is None:
            fetch(_RemoteFile(self._pin, name), expected, path, self.stop, patience=self._patience)
        else:
            _copy(cached, path)

    def _bring_header(self, name: str) -> None:
        """Make the sparse file that has a weight file's size and header."""
        path, size = self.folder / name, self._pin.files[name].size
        if path.exists():
            return
        cached, remote = self._cached(name, check=False), _RemoteFile(self._pin, name)

        def read(start: int, stop: int) -> bytes:
            if cached is None:
                return read_range(remote, start, min(stop, size), size, self._patience, self.stop)
            with open(cached, "rb") as file:
                file.seek(start)
                return file.read(stop - start)

        data = read(0, _HEAD_BYTES)
        length = 8 + int.from_bytes(data[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{remote.name}: header of {length} bytes, more than {MAX_HEADER_BYTES}; not a real checkpoint"
            )
        if length > len(data):
            data += read(len(data), length)
        temporary = path.with_name(name + ".tmp")
        with open(temporary, "wb") as file:
            file.write(data[:length])
            file.truncate(size)
        if temporary.stat().st_blocks * 512 > max(size // 2, length + (1 << 20)):
            temporary.unlink()
            raise ExportError(
                f"{path.parent}: the file system keeps no sparse files; choose a destination on another"
            )
        os.rename(temporary, path)

    def _cached(self, name: str, check: bool) -> Path | None:
        """The file in huggingface_hub's cache if it is there and, with ``check``, its checksum is
        right."""
        from huggingface_hub import try_to_load_from_cache

        found, expected = (
            try_to_load_from_cache(self._pin.repo, name, revision=self._pin.commit),
            self._pin.files[name],
        )
        if not isinstance(found, str) or Path(found).stat().st_size != expected.size:
            return None
        if check:
            digest = expected.digest()
            with open(found, "rb") as file:
                while data := file.read(4 << 20):
                    if self.stop.is_set():
                        raise Stopped
                    digest.update(data)
            if digest.hexdigest() != expected.checksum:
                self._notify(f"{found}: is damaged, so it is not used; remove it")
                return None
        return Path(found)

    def _here(self, name: str) -> Path | None:
        """A weight file that came in an earlier run and was checked then."""
        for folder in (self._weights, self._kept):
            if (
                folder is not None
                and (folder / name).is_file()
                and (folder / name).stat().st_size == self._pin.files[name].size
            ):
                return folder / name
        return None

    def announce(self, files: list[str], export_bytes: int, free_bytes: int) -> int:
        for path in self._weights.iterdir():
            if (
                path.name.removesuffix(".tmp").removesuffix(".incomplete").removesuffix(".ranges")
                not in files
            ):
                self._leave(path)  # it was done when the last run was killed
        sizes = {name: self._pin.files[name].size for name in files}
        coming = [
            name
            for name in files
            if self._here(name) is None and self._cached(name, check=False) is None
        ]
        self._total = sum(sizes[name] for name in coming)
        have = sum(path.stat().st_blocks * 512 for path in self._weights.glob("*.incomplete"))
        at_once = sorted((sizes[name] for name in coming), reverse=True)[
            : None if self._kept is not None else 2
        ]
        peak = max(sum(at_once) - have, 0)
        if files:
            pin, size = self._pin, format_size
            done = f", {size(have)} of it here" if have else ""
            self._notify(
                f"{pin.repo} at commit {pin.commit[:12]}: {len(coming)} of {len(files)} weight files to download, {size(self._total)}{done}"
            )
            self._notify(
                f"disk: {size(export_bytes)} for the export and at most {size(peak)} for weight files, {size(free_bytes)} free;"
                f" afterwards the export remains{'' if self._kept is None else f' and the weight files in {self._kept}'}"
            )
        return peak

    def bring(self, files: list[str]) -> Generator[tuple[str, Path], None, None]:
        with ThreadPoolExecutor(1) as ahead:
            try:
                coming: Future[Path] | None = (
                    ahead.submit(self._arrive, files[0]) if files else None
                )
                for index, file in enumerate(files):
                    assert coming is not None
                    path = coming.result()
                    coming = (
                        ahead.submit(self._arrive, files[index + 1])
                        if index + 1 < len(files)
                        else None
                    )
                    yield file, path
                    if path.parent == self._weights:
                        self._leave(path)
                    elif self._kept is not None and path.parent != self._kept:
                        _copy(path, self._kept / file)
            except BaseException:
                self.stop.set()
                raise

    def _arrive(self, name: str) -> Path:
        path = self._here(name) or self._cached(name, check=True)
        if path is None:
            path = self._weights / name
            fetch(
                _RemoteFile(self._pin, name),
                self._pin.files[name],
                path,
                self.stop,
                self._advance,
                self._patience,
            )
        return path

    def _advance(self, count: int) -> None:
        with self._lock:
            self._done += count
            done = self._done
        self._arriving(done, max(self._total, done))

    def _leave(self, path: Path) -> None:
        """A weight file is done: remove it, or keep it under its name."""
        if self._kept is not None and path.suffix == ".safetensors":
            os.rename(path, self._kept / path.name)
        else:
            path.unlink()

    def keep_small(self) -> None:
        """Complete the kept folder, so that it is a checkpoint."""
        assert self._kept is not None
        for name in (*COPIED, INDEX_NAME):
            if (self.folder / name).is_file():
                _copy(self.folder / name, self._kept / name)


def _copy(source: Path, destination: Path) -> None:
    """``destination`` appears when it is whole; on the same file system, big files take no room
    twice."""
    temporary = destination.with_name(destination.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.rename(temporary, destination)


def quantize_from_hub(
    repo: str,
    revision: str,
    destination: Path,
    *,
    overwrite: bool = False,
    keep_source: bool = False,
    wait_for_lock: bool = False,
    arriving: Progress = lambda done, total: None,
    notify: Notify = lambda text: None,
    ready: Callable[[Path], None] = lambda folder: None,
    patience: Patience | None = None,
    **options: Any,
) -> dict[str, Any]:
    """``slotmoe.offload.ingest.quantize.quantize`` (which gets ``options``) of a model on the hub;
    returns the manifest.

    Killed at any moment, the same call resumes at the byte, from the commit that the first call
    found.  ``keep_source`` leaves the checkpoint in ``DST.source``.  ``arriving(done, total)`` gets
    bytes of the download, ``ready`` the folder of config, tokenizer and headers before any weight
    is fetched.

    Raises what ``quantize`` raises, ``ConfigError`` for a model that can't be had, and
    ``DownloadError``.
    """
    partial = partial_folder(destination)
    download, kept = (
        destination.with_name(destination.name + suffix) for suffix in (".download", ".source")
    )
    with locked(download, wait_for_lock):
        if wait_for_lock and (destination / MANIFEST).is_file():
            finished: dict[str, Any] = json.loads((destination / MANIFEST).read_text())
            _clear(download)
            return finished
        begun = _planned(download)
        if begun is not None and not overwrite and (begun.repo, begun.revision) != (repo, revision):
            raise ExportError(
                f"{download}: was begun with {begun.repo} at {begun.revision}; pass --overwrite to start anew with {repo} at {revision}"
            )
        pin = resolve(repo, revision) if begun is None or overwrite else begun
        if pin != begun:
            _clear(download)
        foreign = (
            [path.name for path in kept.iterdir() if path.name not in pin.files]
            if keep_source and kept.is_dir()
            else []
        )
        if foreign:
            raise ExportError(
                f"{kept}: holds {foreign[0]}, which {repo} has not, so nothing is put there; move it away"
            )
        shards = HubShards(
            pin, download, kept if keep_source else None, arriving, notify, patience or Patience()
        )
        try:
            with full_disk_explained(download):
                shards.prepare()
                ready(shards.folder)
                _plan(download, pin)
                if keep_source:
                    kept.mkdir(exist_ok=True)
            manifest = quantize(
                shards.folder,
                destination,
                overwrite=overwrite,
                wait_for_lock=wait_for_lock,
                notify=notify,
                shards=shards,
                **options,
            )
        except BaseException:
            shards.stop.set()
            if (
                not any((download / "weights").glob("*")) and not partial.exists()
            ):  # nothing has begun
                _clear(download)
            raise
        if keep_source:
            shards.keep_small()
        _clear(download)
        return manifest


def _plan(download: Path, pin: Pin) -> None:
    files = {name: [expected.size, expected.checksum] for name, expected in pin.files.items()}
    write_json(
        download / "plan.json",
        {"repo": pin.repo, "revision": pin.revision, "commit": pin.commit, "files": files},
    )


def _planned(download: Path) -> Pin | None:
    """The commit that a killed run began with, so that all files are of one commit even if the
    revision moved on."""
    try:
        plan = json.loads((download / "plan.json").read_text())
        return Pin(
            plan["repo"],
            plan["revision"],
            plan["commit"],
            {name: Expected(*facts) for name, facts in plan["files"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _clear(download: Path) -> None:
    """Remove what a run made, and refuse to touch anything else."""
    foreign = [
        path.name
        for path in download.iterdir()
        if path.name.removesuffix(".tmp") not in ("plan.json", "headers", "weights")
    ]
    if foreign:
        raise ExportError(
            f"{download}: holds {foreign[0]}, which no download makes, so it is never emptied; move it away"
        )
    (download / "plan.json").unlink(missing_ok=True)
    for path in list(download.iterdir()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def hub_export(repo: str, revision: str | None, cache: Path, **reporting: Any) -> Path:
    """Export of a model on the hub in the folder ``cache``, made now if it is not there yet.

    The commit that a revision was at first is noted there: later runs need no network, and a commit
    that changes a README does not start a download of hundreds of gigabytes.  Raises like
    ``quantize_from_hub``.
    """
    revision = revision or "main"
    name = repo.replace("/", "--")
    note = cache / f"{name}@{quote(revision, safe='')}.json"
    try:
        commit = str(json.loads(note.read_text())["commit"])
    except (OSError, ValueError, KeyError, TypeError):
        commit = resolve(repo, revision).commit
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise ExportError(
                f"{cache}: can't be made ({problem.strerror}); set SLOTMOE_CACHE to a folder that can"
            ) from None
        fresh = note.with_name(
            f"{note.name}.{os.getpid()}-{threading.get_ident()}"
        )  # two may start at once
        fresh.write_text(json.dumps({"commit": commit}))
        os.rename(fresh, note)
    destination = cache / f"{name}-{commit[:12]}-{FORMAT_VERSION}"
    if not (destination / MANIFEST).is_file():
        quantize_from_hub(repo, commit, destination, wait_for_lock=True, **reporting)
    return destination
