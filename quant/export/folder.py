"""``Folder``: the files of an export in one folder, open, with their sizes checked."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from slotmoe import system
from slotmoe.errors import ExportError
from slotmoe.jsonfile import Json
from slotmoe.quant.export.layout import Part, safetensors_header
from slotmoe.quant.export.validate import regular_file
from slotmoe.quant.shapes import ALIGNMENT


class Folder:
    """Files of an export in folder ``path``: the export's own, or a copy of its folder ``inside``.
    ``entries`` are the manifest's, by name.  Raises ``ExportError`` naming the file."""

    def __init__(self, path: Path, entries: Mapping[str, Json], inside: str = ""):
        self.path, self._entries, self._inside = path, entries, inside
        self._handles: dict[str, int] = {}
        self._direct = False

    def path_of(self, name: str) -> Path:
        return self.path / name.removeprefix(self._inside)

    def error(self, name: str, what: str) -> ExportError:
        return ExportError(f"{self.path_of(name)}: {what}")

    def open_file(self, name: str) -> None:
        """Open a file inside the folder and check its size."""
        try:
            path = regular_file(self.path, name.removeprefix(self._inside))
            handle = system.open_file(path, os.O_RDONLY)
            system.use_page_cache(handle)
        except OSError as problem:
            what = f"can't be opened ({problem.strerror})"
            if isinstance(problem, FileNotFoundError):
                copied = f"--experts-dir takes a copy of the export's {self._inside}"
                what += f"; {copied if self._inside else 'the export is incomplete'}"
            raise self.error(name, what) from None
        self._handles[name] = handle
        size, expected = os.fstat(handle).st_size, self._entries[name]["bytes"]
        if size != expected:
            what = f"has {size} bytes, the manifest says {expected}"
            raise self.error(name, f"{what}; the file is truncated or not this export's")

    def verify_header(self, name: str, parts: dict[str, Part]) -> None:
        """The header must be, byte for byte, what the format prescribes for this geometry."""
        header = safetensors_header(parts.items())
        entry = self._entries[name]
        start = bytearray(min(len(header), entry["bytes"]))
        self.read(name, 0, memoryview(start), "its header")
        if entry["header_bytes"] != len(header) or start != header:
            what = "its header is not the one that the manifest describes; quantize again"
            raise self.error(name, what)

    def read(
        self, name: str, offset: int, data: memoryview, what: str, needed: int | None = None
    ) -> None:
        """Fill ``data``, or at least its first ``needed`` bytes, from one range of a file."""
        done, needed = 0, len(data) if needed is None else needed
        while done < needed:
            try:
                count = system.read_at(self._handles[name], data[done:], offset + done)
            except OSError as problem:
                raise self.error(name, f"reading {what} failed ({problem.strerror})") from None
            if self._direct and done + count < needed:
                count -= count % ALIGNMENT  # the next direct read has to be aligned again
            if count == 0:
                raise self.error(name, f"ends inside {what}; the file was truncated while in use")
            done += count

    def bypass_page_cache(self, names: Iterable[str]) -> bool:
        """Read these files past the page cache from now on; False if that is refused."""
        handles = [self._handles[name] for name in names if name in self._handles]
        self._direct = all(system.bypass_page_cache(handle, ALIGNMENT) for handle in handles)
        if not self._direct:
            for handle in handles:
                system.use_page_cache(handle)
        return self._direct

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])
