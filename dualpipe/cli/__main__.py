"""``python -m dualpipe.cli``."""

from dualpipe.cli import main

main()
