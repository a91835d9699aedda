"""What the network and its backends have in common, and import from below: a layer's weights and
sizes, a pass on its way, and what a sequence keeps."""
