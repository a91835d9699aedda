"""Decisions over integers, without torch; ``cache`` has the policies of these names."""

# The default comes last: the most hits at every size and on every text, `python -m bench replay`.
POLICIES = ("lru", "learned")
