"""`python -m octavo.server` is the `octavo` command."""

import sys

from octavo.server.cli import main

if __name__ == "__main__":
    sys.exit(main())
