"""What tests and campaigns keep in blocks."""


def per_token(nbytes):
    """The size of blocks that hold so many bytes of each token."""
    return lambda block: nbytes * len(block.tokens)
