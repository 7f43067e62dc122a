"""Examples: scripts to copy from, and the training of the recall proof's weights."""
