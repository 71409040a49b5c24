"""Run `python -m nanochat COMMAND`, the same as `nanochat COMMAND`."""

from nanochat.cli import main

if __name__ == "__main__":
    main()
