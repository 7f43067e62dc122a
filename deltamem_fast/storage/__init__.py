"""Files that outlive the process. Nothing in here needs torch, so whatever only stores starts in milliseconds."""
