"""Between sequences and their blocks on disk: what is there of a prompt is not computed again, and
what was computed is kept.

Shapes: L layers, T tokens, B bytes of a token's row in the latent cache.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch

from slotmoe.errors import ConfigError
from slotmoe.offload.engine.loading import LoadedModel
from slotmoe.offload.engine.sequence import Sequence
from slotmoe.offload.sessions.blocks import (
    ADDRESS_BYTES,
    BLOCK_TOKENS,
    Block,
    BlockFolder,
    Notify,
    address,
    chain,
    make_private,
    shared_prefix,
)
from slotmoe.quant.export.reader import Export
from slotmoe.sizes import parse_size

DEFAULT_LIMIT = "8GiB"


class Sessions:
    """The latents on disk that ``model`` can use, in ``folder`` and at most ``limit`` bytes.

    Only sequences of the same owner share latents.  Whatever changes their bits belongs to a
    block's address: the export, the program's version, the kernels and the device.  Raises
    ``ConfigError``.
    """

    def __init__(self, model: LoadedModel, folder: Path, limit: int | str, notify: Notify):
        self._identity = _identity(model)
        make_private(folder)
        self._blocks = BlockFolder(folder / "blocks", parse_size(limit), notify)
        self._token_bytes = model.states[0].saved_bytes(0, 1)
        self._counts = dict.fromkeys(("restored_tokens", "read_bytes", "written_bytes"), 0)

    def root(self, owner: str = "") -> bytes:
        """The address from which the owner's sequences start."""
        return hashlib.sha256(self._identity + owner.encode()).digest()[:ADDRESS_BYTES]

    def restore(self, sequence: Sequence, prompt: list[int], owner: str = "") -> int:
        """Append to ``sequence``, which holds a beginning of ``prompt``, what is on disk of the
        rest.  Returns how many tokens that are."""
        parent, before, latest = self.root(owner), sequence.length, None
        for start in range(0, len(prompt), BLOCK_TOKENS):
            tokens = prompt[start : start + BLOCK_TOKENS]
            held = sequence.length
            if start + len(tokens) > held:
                found = self._blocks.read(parent, start, tokens, self._token_bytes)
                if found is None:
                    break
                latest, data = found
                self._counts["read_bytes"] += len(data)
                saved, state = torch.frombuffer(data, dtype=torch.uint8), sequence.state
                common = shared_prefix(latest.tokens, tokens)
                if start + common > held:
                    end = start + len(latest.tokens)
                    state.put(start, end, saved, start + common)
                    sequence.resume(tokens[held - start : common], saved[:0])
                if common < len(tokens):
                    break
            parent = address(parent, tokens)
        if latest is not None:
            self._blocks.touch(latest)
        self._counts["restored_tokens"] += sequence.length - before
        return sequence.length - before

    def keep(self, sequence: Sequence, owner: str = "", added: int | None = None) -> None:
        """Write what ``sequence`` holds and the disk does not: all of it, or, where ``added``
        tokens are new, the blocks that they have filled, if they have filled any."""
        tokens = sequence.tokens
        if added is not None:
            full = len(tokens) // BLOCK_TOKENS
            if full == (len(tokens) - added) // BLOCK_TOKENS:
                return
            tokens = tokens[: full * BLOCK_TOKENS]
        if not tokens or min(tokens) < 0:  # unknown tokens: a measurement's
            return

        def latents(block: Block) -> memoryview:
            return sequence.state.saved(block.start, block.end).numpy().data

        blocks = list(chain(self.root(owner), tokens))
        written = self._blocks.add(blocks, self._token_bytes, latents)
        self._counts["written_bytes"] += written

    def stats(self) -> dict[str, int]:
        """Tokens restored, bytes read and written, and files dropped so far; bytes on disk now, and
        how many there may be."""
        blocks = self._blocks
        there = {"damaged": blocks.damaged, "bytes": blocks.nbytes, "limit": blocks.limit}
        return {**self._counts, **there}


def _identity(model: LoadedModel) -> bytes:
    """Whatever the bits of a latent depend on, besides the tokens.  Raises ``ConfigError``."""
    if not isinstance(model.source, Export):
        problem = "the reference path (quantize=False) keeps no sessions"
        raise ConfigError(f"{problem}; open the model quantized")
    if model.options.route_budget:
        problem = "with a route budget a latent depends on what was cached when it was computed"
        raise ConfigError(f"{problem}: leave out the session or the budget")
    parts = {
        "export": model.source.manifest["checksum"],
        "program": [version("slotmoe"), torch.__version__],
        "device": [model.device.tier, model.device.name, model.backend.name],
        "misses": model.experts.split.mode,
        "experts": model.config.num_experts_per_tok,
        "state": model.states[0].saved_bytes(0, 1),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()
