"""What ``deltamem eval`` gives on the models that can be had anywhere, with fixed plans."""
