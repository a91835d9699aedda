"""GGUF files of DeepSeek-V2 models, as llama.cpp's converter writes them.  ``checkpoint`` alone
needs torch."""

from pathlib import Path

from slotmoe.model.files import ReadFile, files_in
from slotmoe.model.gguf.header import is_gguf, read_header
from slotmoe.model.gguf.metadata import small_files


def files_of(path: Path) -> ReadFile:
    """The small files of a checkpoint folder, or of a GGUF file.  Raises ``CheckpointError``."""
    return small_files(read_header(path)) if is_gguf(path) else files_in(path)
