"""Whether the memory helps: benchmarks of long texts, policies of what stays in context, quality beside cost."""
