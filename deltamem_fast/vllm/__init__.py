"""A plug-in for vLLM: δ-mem inside its continuous batching and its paged cache. See docs/vllm.md.

``plan`` and ``advance`` know nothing of vLLM: (projections, where each sequence lies, paged states) → (reads, states
at block ends). The other modules import it, and are imported by it (entry point ``plugin``) or by a program that uses
it; nothing else in this package imports this room.
"""
