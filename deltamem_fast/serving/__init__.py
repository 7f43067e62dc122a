"""The HTTP endpoint: chat completions as OpenAI's clients ask for them, each with a memory of its user's."""
