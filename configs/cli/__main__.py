"""Entry point of ``python -m malleable``, which is the same as the command ``malleable``."""

from malleable.main import main

if __name__ == "__main__":
    main()
