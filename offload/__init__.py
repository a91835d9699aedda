"""The offload engine: plan, expert cache, disk store, and the ``Runtime`` that composes them with
the network."""
