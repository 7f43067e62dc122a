"""``python -m deltamem_fast`` is the command ``deltamem``."""

import sys


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        from .cli.main import main  # takes a while: an interrupt meanwhile is no traceback either
    except KeyboardInterrupt:
        return 130
    return main()


if __name__ == "__main__":
    sys.exit(main())
