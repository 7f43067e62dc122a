"""The patched model: its forward, its attention, its cache, its generate."""
