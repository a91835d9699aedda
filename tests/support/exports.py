"""Exports that many tests read, made once for all processes of a run and kept for later ones."""

import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from xxhash import xxh3_64_hexdigest, xxh3_128

from slotmoe.offload.ingest.quantize import quantize
from tests.support.tiny import SAMPLE, write_checkpoint

_ROOT = Path(__file__).parents[2]
_KEPT = _ROOT / ".pytest_cache" / "exports"
_MAKERS = ("model", "quant", "offload", "slotmoe", "tests/support")  # whose files change exports


def _content(*folders):
    """A hash of the names and bytes of all source and data files in ``folders``."""
    hashed = xxh3_128()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix != ".pyc":
                hashed.update(f"{path.relative_to(folder)} {xxh3_64_hexdigest(path.read_bytes())}")
    return hashed.hexdigest()


@contextmanager
def made_once(name, **config):
    """The export of the bundled sample, or of a checkpoint of ``tests.support.tiny`` with
    ``config``.  Tests work on copies: at the end it must be as it was."""
    key = _content(*(_ROOT / folder for folder in _MAKERS))
    export = _KEPT / key / name
    if not export.exists():
        _forget_old()
        folder = Path(mkdtemp(prefix=".", dir=_made(_KEPT / key)))
        source = folder / "source" if config else SAMPLE
        if config:
            write_checkpoint(source, **config)
        quantize(source, folder / "export")
        with suppress(OSError):  # another process was quicker
            (folder / "export").rename(export)
        shutil.rmtree(folder)
    before = _content(export)
    yield export
    assert _content(export) == before, f"a test has changed {export}: remove it, and find the test"


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _forget_old():
    for folder in _made(_KEPT).iterdir():
        with suppress(OSError):  # another process forgets it
            if time.time() - folder.stat().st_mtime > 24 * 3600:
                shutil.rmtree(folder)
