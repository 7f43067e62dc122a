"""Looking inside a memory: figures, which tokens wrote and read, pictures."""
