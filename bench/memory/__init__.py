"""A memory one can hold: the operators, sessions and the bank, measured."""
