"""Decisions over integers, without torch; ``cache`` has the policies of these names."""

POLICIES = ("lru", "learned")
DEFAULT_POLICY = (
    "learned"  # the most hits at every size and on every text: `python -m bench replay`
)
