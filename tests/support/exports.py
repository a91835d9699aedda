"""Exports that many tests read, made once for all processes of a run and kept for later ones."""

import shutil
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
                content = xxh3_64_hexdigest(path.read_bytes())
                hashed.update(f"{path.relative_to(folder)} {content}".encode())
    return hashed.hexdigest()


@contextmanager
def made_once(name, **config):
    """The export of the bundled sample, or of a checkpoint of ``tests.support.tiny`` with
    ``config``.  Tests work on copies: at the end it must be as it was."""
    key = _content(*(_ROOT / folder for folder in _MAKERS))
    export = _KEPT / key / name
    if not export.exists():
        export.parent.mkdir(parents=True, exist_ok=True)
        for old in _KEPT.iterdir():
            if old.name != key:
                shutil.rmtree(old, ignore_errors=True)
        folder = Path(mkdtemp(prefix=".", dir=export.parent))
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
