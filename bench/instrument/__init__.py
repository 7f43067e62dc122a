"""What the benchmarks measure with and write down with: clocks, machines, rows, result files, tables, targets."""
