"""One commit of a repository on the hub: what is in it, and the hub's errors in our words.
Metadata, tokens, endpoint, cache, HTTP and Xet are huggingface_hub's."""

import hashlib
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, NamedTuple, TypeVar

from slotmoe.errors import CheckpointError, ConfigError, DownloadError, SlotmoeError
from slotmoe.model import tiktoken
from slotmoe.model.checkpoint.shards import INDEX_NAME
from slotmoe.offload.ingest.output_dir import Stopped
from slotmoe.quant.export.layout import COPIED

T = TypeVar("T")
ATTEMPTS, PAUSE = 8, 1.0  # failures in a row; seconds after the first, doubled each time


class PassingError(Exception):
    """A failure that may not happen again; ``after``: seconds that the server asks to wait."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


class Expected(NamedTuple):
    """The hub's facts of a file: bytes, and its SHA-256 or, if it is small, its git blob id."""

    size: int
    checksum: str

    def checksum_of(self, file: BinaryIO) -> str:
        """Checksum of what the open file holds, of the same kind."""
        digest = hashlib.sha256()
        if len(self.checksum) != 64:
            digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        while data := file.read(1 << 20):
            digest.update(data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository, and what is in it that an export can be made of."""

    repo: str
    revision: str
    commit: str
    files: dict[str, Expected]

    def cached(self, name: str) -> Path | None:
        """The file in huggingface_hub's cache, if it is there with the right size."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.repo, name, revision=self.commit)
        if not isinstance(path, str) or Path(path).stat().st_size != self.files[name].size:
            return None
        return Path(path)


def resolve(repo: str, revision: str) -> Snapshot:
    """The commit that ``revision`` is now, or without a network in huggingface_hub's cache.  Raises
    ``ConfigError`` without such a model or access, ``DownloadError`` if the hub can't be asked."""
    from huggingface_hub import HfApi

    ask = HfApi(library_name="slotmoe").model_info
    given: Any = {"revision": revision, "files_metadata": True, "timeout": 30}
    try:
        info = asked(lambda: ask(repo, **given), repo, revision)
    except DownloadError as problem:
        if (cached := _cached_snapshot(repo, revision)) is not None:
            return cached
        advice = "huggingface_hub's cache holds nothing of it either, so connect to the network"
        raise DownloadError(f"{problem}; {advice}") from None
    files = {}
    for sibling in info.siblings or []:
        size = sibling.size if isinstance(sibling.size, int) else -1
        checksum = str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
        files[str(sibling.rfilename)] = Expected(size, checksum)
    if not is_commit(str(info.sha)):
        answer = f"the hub answers with the commit {info.sha!r:.60}, which is none"
        raise DownloadError(f"{repo}: {answer}; is HF_ENDPOINT right?")
    return Snapshot(repo, revision, str(info.sha), needed(files))


def is_commit(name: str) -> bool:
    return re.fullmatch("[0-9a-f]{40}", name) is not None


def needed(files: dict[str, Expected]) -> dict[str, Expected]:
    """Those that an export is made of, and that the hub describes well."""
    names = (*COPIED, INDEX_NAME, tiktoken.FILE_NAME)
    return {
        name: expected
        for name, expected in files.items()
        if (name in names or ("/" not in name and name.endswith(".safetensors")))
        and re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", expected.checksum)
        and 0 <= expected.size < 1 << 50
    }


def _cached_snapshot(repo: str, revision: str) -> Snapshot | None:
    """What huggingface_hub's cache holds; its links lead to blobs named by checksum."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    files = {}
    for path in Path(config).parent.iterdir():
        blob = Path(os.path.realpath(path))
        if blob.is_file():
            files[path.name] = Expected(blob.stat().st_size, blob.name)
    return Snapshot(repo, revision, Path(config).parent.name, needed(files))


def explained(repo: str, revision: str, problem: Exception) -> Exception:
    """What to raise for huggingface_hub's and HTTP's errors: a way out, or ``PassingError``."""
    from huggingface_hub import constants, errors

    if type(problem) is ValueError and isinstance(problem.__cause__, Exception):
        problem = problem.__cause__  # that a forced download asked for metadata in vain
    hub, login = constants.ENDPOINT, "log in with 'hf auth login' or set HF_TOKEN"
    causes: dict[type[Exception], str] = {
        errors.GatedRepoError: f"is gated; ask for access at {hub}/{repo}, then {login}",
        errors.RepositoryNotFoundError: f"is no folder here and no model on {hub} that you may see;"
        f" check the spelling, and if it is private, {login}",
        errors.RevisionNotFoundError: f"has no revision {revision!r:.80}; --revision takes a"
        " branch, a tag or a commit",
        errors.HFValidationError: "is no folder here and no name that a model on the hub can have;"
        " check the spelling",
    }
    for cause, text in causes.items():
        if isinstance(problem, cause):
            return ConfigError(f"{repo}: {text}")
    if isinstance(problem, errors.EntryNotFoundError):
        text = f"a file that its index names is not there at {revision:.80}"
        return CheckpointError(f"{repo}: {text}; the repository is incomplete")
    if isinstance(problem, errors.OfflineModeIsEnabled):
        return DownloadError(f"{repo}: HF_HUB_OFFLINE forbids to ask the hub")
    reason = str(problem)[:120] or type(problem).__name__
    if isinstance(problem, errors.HfHubHTTPError):
        status, host = problem.response.status_code, str(problem.response.url)
        after = problem.response.headers.get("Retry-After", "")
        # A signed address elsewhere that has expired is asked for again.
        if status in (408, 429) or status >= 500 or not host.startswith(hub):
            seconds = float(after) if after.isdecimal() else 0.0
            return PassingError(f"the server answers {status}", seconds)
        if status in (401, 403):
            text = f"{hub} refuses access ({status}); the token may be wrong or lack the permission"
            return ConfigError(f"{repo}: {text}: {login}")
        text = f"{hub} answers {status}, which no hub should; is HF_ENDPOINT right?"
        return DownloadError(f"{repo}: {text}")
    if "CERTIFICATE_VERIFY_FAILED" in str(problem):
        text = f"the server's certificate is refused ({reason})"
        return DownloadError(f"{repo}: {text}; SSL_CERT_FILE names others to trust")
    if isinstance(problem, OSError) and problem.errno is not None:
        return problem  # the disk's
    if isinstance(problem, (errors.HTTPError, OSError)):  # type: ignore[attr-defined]
        return PassingError(f"the connection to {hub} or where it redirects failed ({reason})")
    return PassingError(f"{hub} does not answer like a hub ({type(problem).__name__}: {reason})")


def asked(
    ask: Callable[[], T], repo: str, revision: str, file: str = "", stop: Event | None = None
) -> T:
    """What ``ask`` returns, for a ``file`` after at most ``ATTEMPTS`` failures in a row.  Raises
    what ``explained`` gives, and ``Stopped`` once ``stop`` is set."""
    stop, attempts = stop or Event(), ATTEMPTS if file else min(ATTEMPTS, 3)
    for failures in count(1):
        if stop.is_set():
            raise Stopped
        try:
            return ask()
        except (SlotmoeError, Stopped):
            raise
        except Exception as problem:
            cause = explained(repo, revision, problem)
        if not isinstance(cause, PassingError):
            raise cause
        if failures >= attempts:
            advice = f"gave up after {failures} attempts, run the same command again to resume"
            raise DownloadError(f"{repo}{file and '/'}{file}: {cause}; {advice}")
        pause = min(PAUSE * 2.0 ** (failures - 1), 60.0) * random.uniform(0.75, 1.25)
        stop.wait(max(pause, min(cause.after, 300.0)))
    raise AssertionError
