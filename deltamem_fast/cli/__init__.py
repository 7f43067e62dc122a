"""The command line: ``deltamem`` and its subcommands."""
