"""``python -m cellquilt`` is the command line."""

from cellquilt.cli import main

main()
