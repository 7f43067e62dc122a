"""What the memory costs in time and room: models, scans and kernels, on a CPU and on a GPU."""
