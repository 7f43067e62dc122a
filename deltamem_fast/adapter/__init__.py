"""What is trained: a layer's parameters, the files they come in, and whose they are."""
