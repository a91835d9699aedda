"""One commit of a repository on the hub: what is in it, where its bytes are, and the hub's errors
in our words.  Metadata, tokens, endpoint and cache are huggingface_hub's."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from slotmoe.errors import CheckpointError, ConfigError, DownloadError
from slotmoe.model.checkpoint import INDEX_NAME
from slotmoe.offload.ingest import http
from slotmoe.offload.ingest.http import Expected, PassingError, Patience, Remote
from slotmoe.quant.export.layout import COPIED


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


def resolve(repo: str, revision: str, patience: Patience) -> Snapshot:
    """The commit that ``revision`` is now.  Without a network, the one that huggingface_hub's cache
    holds.  Raises ``ConfigError`` if there is no such model or access to it, ``DownloadError`` if
    the hub can't be asked."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        api = HfApi(library_name="slotmoe")
        with hub_errors(repo, revision):
            return api.model_info(repo, revision=revision, files_metadata=True, timeout=30)

    few = replace(patience, attempts=min(patience.attempts, 3))
    try:
        info = http.patiently(ask, repo, few, threading.Event())
    except DownloadError as problem:
        if (cached := _cached_snapshot(repo, revision)) is not None:
            return cached
        advice = "huggingface_hub's cache holds nothing of it either, so connect to the network"
        raise DownloadError(f"{problem}; {advice}") from None
    files = {}
    for sibling in info.siblings or []:
        checksum = str(sibling.lfs.sha256 if sibling.lfs else sibling.blob_id)
        sized = isinstance(sibling.size, int) and sibling.size >= 0
        if _is_needed(sibling.rfilename) and _is_digest(checksum) and sized:
            files[sibling.rfilename] = Expected(sibling.size, checksum)
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        answer = f"the hub answers with the commit {info.sha!r:.60}, which is none"
        raise DownloadError(f"{repo}: {answer}; is HF_ENDPOINT right?")
    return Snapshot(repo, revision, info.sha, files)


def _is_needed(name: str) -> bool:
    in_root = "/" not in name and name.endswith(".safetensors")
    return name in COPIED or name == INDEX_NAME or in_root


def _is_digest(text: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}([0-9a-f]{24})?", text) is not None


def _cached_snapshot(repo: str, revision: str) -> Snapshot | None:
    """What huggingface_hub's cache holds; its links lead to blobs named by checksum."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    files = {}
    for path in Path(config).parent.iterdir():
        blob = Path(os.path.realpath(path))
        if _is_needed(path.name) and blob.is_file() and _is_digest(blob.name):
            files[path.name] = Expected(blob.stat().st_size, blob.name)
    return Snapshot(repo, revision, Path(config).parent.name, files)


@contextmanager
def hub_errors(repo: str, revision: str) -> Iterator[None]:
    """huggingface_hub's errors as ours: what the user can do about it, or ``PassingError``."""
    from huggingface_hub import errors

    client = errors.HTTPError  # type: ignore[attr-defined]  # its HTTP client's, whichever that is
    try:
        yield
    except (client, OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise _explained(repo, revision, problem) from None


def _explained(repo: str, revision: str, problem: Exception) -> Exception:
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
    reason = type(problem).__name__
    if isinstance(problem, errors.HfHubHTTPError):
        status = problem.response.status_code
        if status in (401, 403):
            text = f"{hub} refuses access ({status}); the token may be wrong or lack the permission"
            return ConfigError(f"{repo}: {text}: {login}")
        if status in (408, 429) or status >= 500:
            return http.status_error(status, problem.response.headers)
        text = f"{hub} answers {status}, which no hub should; is HF_ENDPOINT right?"
        return DownloadError(f"{repo}: {text}")
    if isinstance(problem, (errors.HTTPError, OSError)):  # type: ignore[attr-defined]
        return PassingError(f"{hub} can't be reached ({str(problem)[:120] or reason})")
    return PassingError(f"{hub} does not answer like a hub ({reason})")


def _headers(url: str) -> dict[str, str]:
    """What to send to ``url``: the token goes to the hub alone."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    ours, hub = urlsplit(url), urlsplit(constants.ENDPOINT)
    at_hub = (ours.scheme, ours.netloc) == (hub.scheme, hub.netloc)
    return build_hf_headers(library_name="slotmoe", token=None if at_hub else False)


def remote_file(snapshot: Snapshot, file: str, patience: Patience) -> Remote:
    """Where the bytes of one file of a snapshot are."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    name, commit, expected = f"{snapshot.repo}/{file}", snapshot.commit, snapshot.files[file]

    def ask() -> str:
        url = hf_hub_url(snapshot.repo, file, revision=commit)
        with hub_errors(snapshot.repo, commit):
            answer = get_hf_file_metadata(url, library_name="slotmoe")
        if answer.commit_hash not in (None, commit):
            commits = f"commit {answer.commit_hash} instead of {commit}"
            raise DownloadError(f"{name}: the hub answers for {commits}; try again later")
        etag = answer.etag or ""
        comparable = _is_digest(etag) and len(etag) == len(expected.checksum)
        if answer.size not in (None, expected.size) or (comparable and etag != expected.checksum):
            now = f"is {answer.size} bytes with checksum {etag:.64} now"
            promise = f"the hub promised {expected.size} bytes with {expected.checksum}"
            raise DownloadError(f"{name}: {now}, {promise}; pass --overwrite to start anew")
        return urljoin(url, answer.location)

    return Remote(name, expected, ask, _headers, patience)
