"""Files that outlive the process. Nothing but ``tensors`` needs torch: what only stores starts in milliseconds."""
