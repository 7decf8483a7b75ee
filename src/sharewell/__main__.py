"""``python -m sharewell``: the same as the ``sharewell`` command."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
