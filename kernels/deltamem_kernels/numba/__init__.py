"""The operators as compiled loops for a CPU."""
