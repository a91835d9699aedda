"""Sessions on disk: what was computed of a conversation outlives the process.

``blocks`` keeps the latents of tokens in files, ``store`` moves them to and from sequences, and
``names`` keeps conversations under the names that users give them.
"""
