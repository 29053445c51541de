"""Run the command line as `python -m lightning_prune`."""

import sys

from lightning_prune.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
