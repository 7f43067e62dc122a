"""``deltamem chat``: a conversation in a terminal, or over a pipe; what leaves the context stays in the memory."""
