"""Kernels of the delta-rule memory. Needs torch; Triton is imported when a kernel is first used."""
