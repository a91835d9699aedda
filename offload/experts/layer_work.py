"""How far a pass has come, and what is left of a layer, as ``slotmoe.offload.experts`` goes on."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from slotmoe.offload.devices.device import Event
from slotmoe.offload.experts.source import Read


@dataclass
class Pass:
    """A pass over ``tokens`` tokens: in steps, ``seen`` of them have been through layer ``row``."""

    tokens: int = 0
    row: int = -1
    seen: int = 0

    def reach(self, row: int, tokens: int) -> None:
        """A step's tokens are at a layer."""
        self.seen = (self.seen if row == self.row else 0) + tokens
        self.row = row

    @property
    def later(self) -> int:
        """Tokens that this step's layer has still to see."""
        return self.tokens - self.seen


@dataclass
class Work:
    """What is left of a layer: ``uses`` counts each expert's tokens, ``newest`` are the newest
    token's experts, ``kept`` the ids that stay for the pass's next step or layer; ids ``cached``,
    to be read ``later``, or ``used`` in staging; reads on their way, and copies of those taken."""

    row: int
    uses: Mapping[int, int]
    newest: set[int]
    kept: range
    cached: list[int] = field(default_factory=list)
    later: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    copies: list[Event] = field(default_factory=list)

    @property
    def many(self) -> bool:
        """Whether other tokens use other experts than the newest."""
        return len(self.uses) > len(self.newest)
