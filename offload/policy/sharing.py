"""How prompts share the passes that read them: arithmetic without torch.

Prompts stand in a line, and a pass reads the first ones of it.  A new prompt overtakes those that
have more tokens left.  Each allows that for a share of its own tokens, so that a long one waits at
most so much longer, however many short ones come.
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


def shares(line: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each prompt the next pass reads, at most ``budget``, by the tokens that
    each in the line has left.  Those that have at most twice as many as the first are read with it,
    since they share its experts.  Another gets as many as those before it together, so that they
    wait for it no longer than for themselves."""
    counts, taken = list[int](), 0
    for left in line:
        most = left if left <= 2 * line[0] else max(PIECE, taken)
        if not (count := min(left, most, budget - taken)):
            break
        counts.append(count)
        taken += count
        if count < left:
            break
    return counts
