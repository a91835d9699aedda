"""Decisions over integers, without torch; ``cache`` has the policies of these names."""

POLICIES = ("lru", "learned")
# The most hits at every size and on every text: `python -m bench replay`.
DEFAULT_POLICY = "learned"
