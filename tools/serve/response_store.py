"""Responses that clients may go on from, in memory."""

import json
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from slotmoe.jsonfile import Json

MAX_RESPONSES = 256
MAX_SIZE = 16 << 20  # characters of all stored responses and their conversations together
_ITEM = 1024  # characters that the objects of an item weigh as much as


@dataclass(frozen=True)
class Stored:
    """A response, and the items of its whole conversation, itself included."""

    response: Json
    items: Sequence[Json]
    events: bytes  # that a stream of it consists of, packed
    size: int


class ResponseStore:
    """The latest responses of each owner, a client's key.  The one that was unused for longest goes
    first: beyond ``most`` of them, or where together they are larger than ``size``."""

    def __init__(self, most: int = MAX_RESPONSES, size: int = MAX_SIZE):
        self._most, self._size = most, size
        self._stored: OrderedDict[tuple[str, str], Stored] = OrderedDict()

    def put(self, owner: str, response: Json, items: Sequence[Json], events: str = "") -> None:
        """Keep ``response``, unless it is too large by itself."""
        packed = zlib.compress(events.encode(), 1)
        size = len(json.dumps([response, items])) + _ITEM * len(items) + len(packed)
        if size > self._size:
            return
        self._stored[owner, response["id"]] = Stored(response, items, packed, size)
        total = sum(stored.size for stored in self._stored.values())
        while len(self._stored) > self._most or total > self._size:
            total -= self._stored.popitem(last=False)[1].size

    def get(self, owner: str, id_: str) -> Stored | None:
        if (stored := self._stored.get((owner, id_))) is not None:
            self._stored.move_to_end((owner, id_))
        return stored

    def delete(self, owner: str, id_: str) -> None:
        self._stored.pop((owner, id_), None)

    def item(self, owner: str, id_: str) -> Json | None:
        theirs = [stored.items for (of, _), stored in self._stored.items() if of == owner]
        items = (item for conversation in theirs for item in conversation)
        return next((item for item in items if item["id"] == id_), None)
