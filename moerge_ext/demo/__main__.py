"""`python -m moerge_ext.demo` runs the demo."""

from .run import main

raise SystemExit(main())
