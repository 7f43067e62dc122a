"""What an evaluation does unless it is told otherwise; imports nothing, so that a command line can show it."""

CHUNK = 512  # tokens of a forward over a document
BATCH = 8  # questions of a document answered together; documents told together
CHUNK_TOKENS = 256  # of what retrieval finds
EMBEDDER = "sentence-transformers/all-MiniLM-L6-v2"  # of dense retrieval
