"""A long life: millions of tokens, thousands of turns, and an hour of a bank under kills."""
