"""Pictures, labels, and the order they come in."""
