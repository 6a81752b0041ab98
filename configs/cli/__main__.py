"""``python -m malleable``: the same command line."""

from malleable.main import main

if __name__ == "__main__":
    main()
