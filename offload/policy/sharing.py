"""How prompts share the passes that read them: arithmetic without torch.

A pass reads the first prompts of a line.  A new one overtakes those with more tokens left, which
allow that for a share of their own: so much longer they wait, however many short ones come.
"""

from collections.abc import Sequence

PIECE = 64  # tokens of prompts in a pass where others decode, and the least that a pass is for
_SHARE = 0.3  # of a prompt's tokens, as many others may be read before them


def allowance(left: int) -> int:
    """How much a prompt of so many unread tokens lets others cost it."""
    return int(_SHARE * left)


def place(left: int, costs: int, line: Sequence[tuple[int, int]]) -> int:
    """Where a new prompt of so many unread tokens, which ``costs`` those behind it so much, stands
    in the ``line``, whose prompts have so many left and let others cost them so much."""
    index = len(line)
    while index and left < line[index - 1][0] and costs <= line[index - 1][1]:
        index -= 1
    return index


def shares(line: Sequence[int], budget: int, free: int) -> list[int]:
    """How many tokens of each prompt the next pass reads, at most ``budget``, by the tokens that
    each in the line has left.  Behind the end of the first, others get as many as that has, so that
    it waits no longer for them than for itself, or ``free``, which a pass costs anyway."""
    counts, room = list[int](), min(budget, line[0] + max(line[0], free)) if line else 0
    for left in line:
        counts.append(min(left, room))
        room -= counts[-1]
    return [count for count in counts if count]
