"""From what people write to tokens and segments, and from tokens back."""
