"""Benchmarks: ``python -m bench`` measures and writes JSON, ``python -m bench.report`` makes pages of it."""
