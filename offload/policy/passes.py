"""Which rows a pass computes, pieces of prompts and drafts: arithmetic without torch.

A pass reads the first prompts of a line.  A new one overtakes those with more tokens left, which
allow that for a share of their own: so much longer they wait, however many short ones come.

A draft is tokens that may come next.  A pass computes them together with the token that is certain,
and a row of logits whose token the sampler then chooses is a pass saved.  Drafts come from the text
itself: what followed its last tokens where they stood before (prompt lookup, arXiv 2304.04487); or
from a head of the model that predicts one token more.
"""

from collections.abc import Sequence

PIECE = 64  # tokens of prompts in a pass where others decode, and the least that a pass is for
_SHARE = 0.3  # of a prompt's tokens, as many others may be read before them
DRAFTS = ("auto", "off", "ngram", "mtp")
MOST_DRAFTED = 15  # tokens of all drafts of a pass
# The same where experts come from disk: a row costs most of a pass, and its memory is slots'.
FEW_DRAFTED = 3
_PAIR = 2  # the least tokens that must be alike; also what the index is by
_LONG = 32  # alike tokens beyond which no better place is looked for
_TRIES = 32  # places that are compared
_RECENT = 64  # of a text that is read at once, the tokens that count as predicted or not
# Chance of a prediction before any was made, by the bits of the number of alike tokens.
_CHANCES = (0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
MEMORY = 64  # predictions that count at most
_PRIOR = 0.35  # cost of a row more, as a share of a pass of one row, before any was measured
RATE = 0.3  # of an error that the estimate of a pass's time takes over
Draft = list[tuple[int, float]]  # tokens, each with the chance that all up to it come
_LEAST = 0.03  # cost of a row more, whatever was measured
_FORGET = 0.003  # of that cost's distance to the prior, with each pass of one row


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


class NGrams:
    """A text's tokens, and what followed its last ones earlier.

    ``chances`` are running averages over what came and would have been drafted, at no cost.
    """

    def __init__(self) -> None:
        self._is_whole = True  # no reading was interrupted
        self._forget()

    def _forget(self) -> None:
        self._chances = [*_CHANCES]
        self._counts = [0] * len(_CHANCES)
        self._tokens = list[int]()
        # By the tokens before: where the last two stood latest, and for each place, where before.
        self._latest = dict[tuple[int, int], int]()
        self._earlier = [0]
        self._place = self._alike = 0  # so many tokens before the place are the last ones

    def read(self, tokens: Sequence[int], id: int, anew: bool) -> None:
        """The text is ``tokens`` and ``id``: that before, and what has come since, or, ``anew``,
        any, of which what it shares with that before is not read again."""
        known = len(self._tokens)
        is_same = self._is_whole and known <= len(tokens)
        if not is_same or (anew and self._tokens != tokens[:known]):
            known = 0
            self._forget()
        self._is_whole = False
        for index in range(known, len(tokens)):
            self._add(tokens[index], len(tokens) - index < _RECENT)
        self._add(id, True)
        self._is_whole = True

    def _add(self, token: int, counts: bool) -> None:
        tokens = self._tokens
        if self._alike and tokens[self._place] == token:
            self._note(1.0)
            self._place, self._alike = self._place + 1, self._alike + 1
        elif self._alike:
            self._note(0.0)
            self._alike = 0
        tokens.append(token)
        pair = (tokens[-_PAIR], token) if len(tokens) >= _PAIR else (-1, token)
        earlier = self._latest.get(pair, 0)
        self._earlier.append(earlier)
        self._latest[pair] = len(tokens)
        if earlier and counts and self._alike < _LONG:
            self._look_up(earlier)

    def _look_up(self, place: int) -> None:
        """Take the latest of the places with the most alike tokens."""
        tokens = self._tokens
        for _ in range(_TRIES):
            alike = _PAIR
            while alike < min(_LONG, place) and tokens[place - alike - 1] == tokens[-alike - 1]:
                alike += 1
            if alike > self._alike:
                self._place, self._alike = place, alike
            if not (place := self._earlier[place]):
                return

    def _note(self, hit: float) -> None:
        kind = _kind(self._alike)
        self._counts[kind] = count = min(self._counts[kind] + 1, MEMORY)
        self._chances[kind] += (hit - self._chances[kind]) / (count + 1)

    def draft(self, limit: int) -> Draft:
        """At most ``limit`` tokens that may come next, and the chance that all up to each come."""
        drafted: Draft = []
        chance = 1.0
        for index in range(limit if self._alike else 0):
            place = self._place + index
            beyond = place - len(self._tokens)  # a text that repeats itself goes on so
            token = self._tokens[place] if beyond < 0 else drafted[beyond][0]
            chance *= self._chances[_kind(self._alike + index)]
            drafted.append((token, chance))
        return drafted


def _kind(alike: int) -> int:
    return min(alike.bit_length(), len(_CHANCES) - 1)


class Drafting:
    """How many rows a pass is worth, from the seconds that passes took, and the counts.

    The time of a pass without drafts is known by the rows that it has for certain, one of each
    text, once there was one; that of a draft's rows is taken as linear in them: in memory a row
    more is arithmetic, from a disk it is the experts that it misses.
    """

    def __init__(self, limit: int = MOST_DRAFTED) -> None:
        """At most ``limit`` tokens are drafted in a pass."""
        self._limit = limit
        self.passes = self.rows = self.drafted = self.accepted = 0
        self._plain = dict[int, float]()  # seconds of a pass without drafts, by its rows
        self._one = self._more = 0.0  # such seconds for a row, of the last pass; of a row more
        self._drafting = 0  # passes with drafts
        self.most = 1  # tokens to draft: what was never tried is approached by steps

    def lengths(self, chances: Sequence[Sequence[float]], room: int) -> list[int]:
        """How many tokens of each sequence's draft to compute, ``room`` at most, given the
        ``chances`` of each: as long as the tokens that a row more is expected to give come sooner
        with it than without."""
        taken, expected = [0] * len(chances), float(len(chances))
        seconds = self._plain.get(len(chances), 0.0)
        for _ in range(min(self.most, room) if seconds else 0):
            pairs = zip(taken, chances, strict=True)
            gains = [likely[n] if n < len(likely) else 0.0 for n, likely in pairs]
            best = max(range(len(gains)), key=gains.__getitem__)
            if gains[best] * seconds <= expected * self._more:
                break
            taken[best] += 1
            expected, seconds = expected + gains[best], seconds + self._more
        return taken

    def pays(self, chance: float, cost: float) -> bool:
        """Whether a draft of one token, which takes ``cost`` seconds to make and comes true with
        this ``chance``, gains time; so before any pass was measured."""
        return not self._one or chance * self._one > self._more + cost

    def measured(self, rows: int, drafted: int, seconds: float | None) -> None:
        """A pass of ``rows``, so many ``drafted``, took ``seconds``, None if it read prompts."""
        self.passes, self.rows = self.passes + 1, self.rows + rows
        self.drafted += drafted
        if seconds is None:
            return
        certain = rows - drafted
        plain = self._plain.setdefault(certain, seconds)
        usual = plain * _PRIOR / (1 + _PRIOR * (certain - 1))
        self._more = self._more or usual
        predicted = plain + drafted * self._more
        error = min(seconds - predicted, predicted)  # a pass that was held up changes little
        if drafted:
            self._drafting += 1
            self.most = min(self._limit, max(self.most, 2 * drafted + 1))
            self._more += max(RATE, 1 / self._drafting) * error / drafted
        else:
            self._plain[certain] = plain + RATE * error
            self._more += _FORGET * (usual - self._more)
        self._one = self._plain[certain] / certain
        self._more = max(self._more, _LEAST * self._one)
        if self._more >= self._one:  # nothing pays; what is forgotten is tried again by one row
            self.most = 1

    def stats(self) -> dict[str, int]:
        """Passes of decode and their rows; of these, tokens that were drafted, and that came."""
        return {name: getattr(self, name) for name in ("passes", "rows", "drafted", "accepted")}
