"""`python -m moerge_ext`: the same as the `moerge` command."""

import sys

from .commands.main import main

sys.exit(main())
