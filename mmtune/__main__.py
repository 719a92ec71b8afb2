"""Run the command line as ``python -m mmtune``."""

from mmtune.cli import main

if __name__ == "__main__":
    main()
