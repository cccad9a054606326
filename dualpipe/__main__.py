"""``python -m dualpipe``."""

from dualpipe.cli import main

main()
