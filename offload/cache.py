"""Which experts keep a slot: policy over integers, without torch.

An expert is named by one integer key (layer * n_experts + expert).  The mechanism (who copies bytes) lives elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

POLICIES = ("lru",)


class LruCache:
    """Least recently used over ``slots`` slots.  A key in use is pinned by naming it in ``keep``."""

    def __init__(self, slots: int):
        self._slot_of: OrderedDict[int, int] = OrderedDict()  # oldest use first
        self.slots = slots
        self._free = list(range(slots - 1, -1, -1))
        self.hits = self.misses = self.evictions = 0

    def lookup(self, key: int) -> int | None:
        """Slot of ``key``, marked as just used, or None; counts a hit or a miss."""
        slot = self._slot_of.get(key)
        if slot is None:
            self.misses += 1
            return None
        self.hits += 1
        self._slot_of.move_to_end(key)
        return slot

    def admit(self, key: int, keep: Collection[int] = ()) -> int:
        """A slot for the absent ``key``: a free one, or that of the oldest key outside ``keep``."""
        assert key not in self._slot_of
        if self._free:
            slot = self._free.pop()
        else:
            victim = next(other for other in self._slot_of if other not in keep)
            slot = self._slot_of.pop(victim)
            self.evictions += 1
        self._slot_of[key] = slot
        return slot

    def drop(self, key: int) -> None:
        """Forget ``key``, whose slot holds nothing usable."""
        self._free.append(self._slot_of.pop(key))

    def __contains__(self, key: int) -> bool:
        return key in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)
