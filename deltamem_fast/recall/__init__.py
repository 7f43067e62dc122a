"""The recall proof: a small world of facts, a backbone that answers from its context, adapters that remember."""
