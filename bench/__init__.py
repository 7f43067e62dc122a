"""Benchmarks: ``python -m bench`` measures and writes JSON, ``python -m bench.table`` prints it as Markdown."""
