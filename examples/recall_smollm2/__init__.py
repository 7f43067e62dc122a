"""Adapters that give SmolLM2-135M-Instruct a memory for facts told in free sentences."""
