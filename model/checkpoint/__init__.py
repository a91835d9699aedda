"""Checkpoints: which tensor lies where, how it is encoded, and its values."""
