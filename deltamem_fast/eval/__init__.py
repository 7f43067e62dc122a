"""Whether the memory helps: benchmarks of long conversations, policies of what stays in context, quality and cost."""
