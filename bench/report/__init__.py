"""docs/results: pages and pictures of the newest results, and README's few rows."""
