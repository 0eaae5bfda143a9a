"""`python -m moerge_ext`: the same as the `moerge` command."""

import sys

from .cli import main

sys.exit(main())
