"""A conversation's memory: its state in every layer, the operators on it, its file, and many of them in a bank."""
