"""``python -m clipsys``."""

from clipsys.cli import main

main()
