"""How much of a sequence is remembered where tokens are compressed: lengths that it can be cut to.
Without torch: a plan counts their bytes.

A mark is what the next token behind such a length needs of the tokens before, beside what stays.
"""

SPARE = 16  # tokens that can be cut off without a mark
MARK_TOKENS = 256  # a mark stands at each multiple, whatever the passes are
MOST_MARKS = 8  # that a sequence remembers when a pass begins
MOST_ENDS = 4  # of them, those where texts have ended last; the others stand at multiples
