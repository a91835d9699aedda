"""Between sequences and their blocks on disk: what is there is not computed again."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from slotmoe.errors import ConfigError
from slotmoe.jsonfile import Json
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.engine.passes import Sequence
from slotmoe.offload.machine import check_locks
from slotmoe.offload.sessions import blocks
from slotmoe.offload.sessions.blocks import BLOCK_TOKENS, FORMAT, TokenBlock, chain, shared_prefix
from slotmoe.quant.export.reader import Export
from slotmoe.quant.kernels.cpu.bindings import load
from slotmoe.sizes import parse_size

DEFAULT_LIMIT = "8GiB"
_NONE = torch.empty(0, dtype=torch.uint8)


class Sessions:
    """The latents on disk that ``model`` can use, in ``folder`` and at most ``limit`` bytes.

    Only sequences of the same owner share latents.  Whatever changes their bits belongs to a
    block's address: export, program's version, kernels, threads and device.  Raises
    ``ConfigError``.
    """

    def __init__(self, model: LoadedModel, folder: Path, limit: int | str, notify: blocks.Notify):
        self._identity = _identity(model)
        blocks.make_private(folder)
        blocks.make_private(folder / "blocks")
        check_locks(folder / "blocks")
        self._blocks = blocks.BlockFolder(folder / "blocks", parse_size(limit), notify)
        self._state = model.states[0]  # all need the same bytes
        self._counts = dict.fromkeys(("restored_tokens", "read_bytes", "written_bytes"), 0)

    def root(self, owner: str = "") -> bytes:
        """The address from which the owner's sequences start."""
        return hashlib.sha256(self._identity + owner.encode()).digest()[: blocks.ADDRESS_BYTES]

    def restore(self, sequence: Sequence, prompt: list[int], owner: str = "") -> int:
        """Append what the disk has of ``prompt`` to ``sequence``, its beginning; tokens added."""
        held, latest = sequence.length, None
        there = list[TokenBlock]()  # what is in the state now behind the tokens that it held
        for block in chain(self.root(owner), prompt):
            if block.end <= held:
                continue
            if (found := self._blocks.read(block, self._size)) is None:
                break
            latest, data = found
            begun = block.begun(shared_prefix(latest.tokens, block.tokens))
            sequence.state.put(block.start, latest.end, self._tensor(data), begun.end)
            there.append(begun)
            if begun.end < block.end:
                break
        if latest is not None:
            self._blocks.touch(latest)
        while there and not self._resume(sequence, prompt, there.pop()):
            pass
        self._counts["restored_tokens"] += sequence.length - held
        return sequence.length - held

    def _resume(self, sequence: Sequence, prompt: list[int], block: TokenBlock) -> bool:
        """Let ``sequence`` go on as far as a snapshot in ``block`` allows; whether one does."""
        end, snapshot = block.end, _NONE
        if self._state.snapshot_bytes(end):
            found = self._blocks.snapshot(block, self._size)
            if found is None or found[0].end <= sequence.length:
                return False
            end, snapshot = found[0].end, self._tensor(found[1])
            self._blocks.touch(found[0])
        sequence.resume(prompt[sequence.length : end], snapshot)
        return True

    def _tensor(self, data: memoryview) -> Tensor:
        """What was read, uint8 in RAM."""
        self._counts["read_bytes"] += len(data)
        return torch.frombuffer(data, dtype=torch.uint8) if len(data) else _NONE

    def _size(self, block: TokenBlock) -> int:
        if block.is_snapshot:
            return self._state.snapshot_bytes(block.end)
        return self._state.saved_bytes(block.start, block.end)

    def keep(self, sequence: Sequence, owner: str = "", added: int | None = None) -> None:
        """Write what ``sequence`` holds and the disk does not: all of it, or, where ``added``
        tokens are new, the blocks that they have filled, if they have filled any."""
        tokens, state = sequence.tokens, sequence.state
        if added is not None:
            full = len(tokens) // BLOCK_TOKENS
            if full == (len(tokens) - added) // BLOCK_TOKENS:
                return
            tokens = tokens[: full * BLOCK_TOKENS]
        if not tokens:
            return

        def content(block: TokenBlock) -> memoryview:
            if not block.is_snapshot:
                return state.saved(block.start, block.end).numpy().data
            snapshot = state.snapshot(block.end)
            assert snapshot is not None
            return snapshot.numpy().data

        there = list(chain(self.root(owner), tokens))
        snapshots = list[TokenBlock]()
        for mark in state.marks:
            if mark <= len(tokens):
                block = there[(mark - 1) // BLOCK_TOKENS]
                snapshots.append(block.begun(mark - block.start, is_snapshot=True))
        self._counts["written_bytes"] += self._blocks.add(there, self._size, content, snapshots)

    def stats(self) -> Json:
        """Tokens restored, bytes read and written, and files dropped so far; bytes on disk now, and
        how many there may be; and ``bits``, the same on machines that use each other's latents."""
        held = self._blocks
        there = {"damaged": held.damaged, "bytes": held.nbytes, "limit": held.limit}
        return {**self._counts, **there, "bits": self._identity.hex()[:16]}


def _identity(model: LoadedModel) -> bytes:
    """Whatever the bits of a latent depend on, besides the tokens.  Raises ``ConfigError``."""
    if not isinstance(model.source, Export):
        problem = "the reference path (quantize=False) keeps no sessions"
        raise ConfigError(f"{problem}; open the model quantized")
    state, native = model.states[0], load() if model.backend.kind == "native" else None
    manifest = model.source.manifest
    parts = {  # of the export all but what it was made of, and when
        "export": {key: manifest[key] for key in manifest.keys() - {"checksum", "source"}},
        "program": [version("slotmoe"), torch.__version__],
        "kernels": native and native.digest,
        "torch": torch.backends.cpu.get_cpu_capability(),
        "device": [model.device.tier, model.device.name, model.backend.name],
        "misses": model.experts.misses,
        "experts": model.config.num_experts_per_tok,
        "state": [FORMAT.decode(), state.saved_bytes(0, 1024), state.snapshot_bytes(1023)],
    }
    on_cpu = model.device.tier == "ram" or model.experts.misses != "fetch"
    if on_cpu and model.cpu.kind == "torch":  # whose sums have an order by threads
        parts["threads"] = model.device.placement.threads
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
