"""make recall: what the shipped weights remember, against the backbone's own context and against retrieval."""
