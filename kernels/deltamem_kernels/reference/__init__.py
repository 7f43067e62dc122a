"""The operators in plain PyTorch: what every other implementation is compared with."""
