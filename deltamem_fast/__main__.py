"""``python -m deltamem_fast`` is the command ``deltamem``."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
