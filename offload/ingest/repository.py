"""One commit of a repository on the hub: what is in it, where its bytes are, and the hub's errors
in our words.  Metadata, tokens, endpoint, cache and HTTP are huggingface_hub's."""

import hashlib
import os
import random
import re
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from slotmoe.errors import CheckpointError, ConfigError, DownloadError
from slotmoe.model import tiktoken
from slotmoe.model.checkpoint.shards import INDEX_NAME
from slotmoe.quant.export.layout import COPIED


class PassingError(Exception):
    """A failure that may not happen again; ``after``: seconds that the server asks to wait."""

    def __init__(self, message: str, after: float = 0.0):
        super().__init__(message)
        self.after = after


@dataclass(frozen=True)
class Patience:
    """How long to bear with a bad connection: ``stall`` seconds for each buffer, ``attempts``
    failures in a row, between them ``pause`` seconds, doubled each time up to a minute."""

    stall: float = 30.0
    attempts: int = 8
    pause: float = 1.0

    def pause_after(self, failures: int, what: str, problem: PassingError) -> float:
        """Seconds to wait after so many failures in a row.  Raises ``DownloadError``."""
        if failures >= self.attempts:
            advice = f"gave up after {failures} attempts, run the same command again to resume"
            raise DownloadError(f"{what}: {problem}; {advice}") from None
        pause = min(self.pause * 2.0 ** (failures - 1), 60.0) * random.uniform(0.75, 1.25)
        return max(pause, min(problem.after, 300.0))


class Expected(NamedTuple):
    """The hub's facts of a file: bytes, and its SHA-256 or, if it is small, its git blob id."""

    size: int
    checksum: str

    def digest(self) -> "hashlib._Hash":
        """An empty hash of the right kind."""
        if len(self.checksum) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True)
class Remote:
    """One file of a commit, and its address at the hub, which may redirect to another host."""

    repo: str
    commit: str
    file: str
    expected: Expected
    url: str
    patience: Patience

    @property
    def name(self) -> str:
        return f"{self.repo}/{self.file}"

    def check(self, response: Any, start: int) -> None:
        """Refuse the answer to a request for byte ``start`` and later ones if it has not these of
        the file that the hub described: ``PassingError``, or for good a ``SlotmoeError``."""
        from huggingface_hub import constants
        from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]

        status, size = response.status_code, self.expected.size
        if str(response.url).startswith(constants.ENDPOINT):
            hf_raise_for_status(response)
        elif status not in (200, 206):  # a signed address that has expired, too
            raise _status_error(response)
        for answer in (*response.history, response):
            if (commit := answer.headers.get("X-Repo-Commit", self.commit)) != self.commit:
                commits = f"commit {commit:.40} instead of {self.commit}"
                raise DownloadError(f"{self.name}: the hub answers for {commits}; try again later")
        span = response.headers.get("Content-Range", "")
        first, total = span.removeprefix("bytes ").split("-")[0], span.rpartition("/")[2]
        if status == 200:
            first, total = str(start), response.headers.get("Content-Length", "*")
        if total not in (str(size), "*"):
            sizes = f"the server's file has {total[:40]!r} bytes, the hub promises {size}"
            raise DownloadError(f"{self.name}: {sizes}; try again later")
        if first != str(start):
            raise PassingError(f"the server sends bytes from {first[:40]!r} on instead of {start}")


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

    def remote(self, name: str, patience: Patience) -> Remote:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(self.repo, name, revision=self.commit)
        return Remote(self.repo, self.commit, name, self.files[name], url, patience)


def resolve(repo: str, revision: str, patience: Patience) -> Snapshot:
    """The commit that ``revision`` is now, or without a network in huggingface_hub's cache.  Raises
    ``ConfigError`` without such a model or access, ``DownloadError`` if the hub can't be asked."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="slotmoe")
    few = Patience(patience.stall, min(patience.attempts, 3), patience.pause)
    try:
        for failures in count(1):
            try:
                info = api.model_info(repo, revision=revision, files_metadata=True, timeout=30)
                break
            except Exception as problem:
                cause = explained(repo, revision, problem)
                if not isinstance(cause, PassingError):
                    raise cause from None
                time.sleep(few.pause_after(failures, repo, cause))
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
        status = problem.response.status_code
        if status in (401, 403):
            text = f"{hub} refuses access ({status}); the token may be wrong or lack the permission"
            return ConfigError(f"{repo}: {text}: {login}")
        if status in (408, 429) or status >= 500:
            return _status_error(problem.response)
        text = f"{hub} answers {status}, which no hub should; is HF_ENDPOINT right?"
        return DownloadError(f"{repo}: {text}")
    if "CERTIFICATE_VERIFY_FAILED" in str(problem):
        text = f"the server's certificate is refused ({reason})"
        return DownloadError(f"{repo}: {text}; SSL_CERT_FILE names others to trust")
    if isinstance(problem, (errors.HTTPError, OSError)):  # type: ignore[attr-defined]
        return PassingError(f"the connection to {hub} or where it redirects failed ({reason})")
    return PassingError(f"{hub} does not answer like a hub ({type(problem).__name__})")


def _status_error(response: Any) -> PassingError:
    """The failure that a status is, with the whole seconds to wait, if the server asks."""
    after = response.headers.get("Retry-After", "")
    seconds = float(after) if after.isdecimal() else 0.0
    return PassingError(f"the server answers {response.status_code}", seconds)
