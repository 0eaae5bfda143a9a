"""Writes the tables of bench/README.md, of the top README and of docs/ from bench/results/.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; everything between the two is replaced. `--check`
changes nothing and fails when a file is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script only its own folder is on the path

from bench.render import TABLES
from bench.results import FOLDER, Row, latest, read_all

REPO = Path(__file__).resolve().parents[1]
PAGES = ("bench/README.md", "README.md", "docs/whole_way.md", "docs/methods.md")
FILES = tuple(REPO / name for name in PAGES)
BLOCK = re.compile(r"(<!-- bench:([a-z-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def fill(text: str, rows: list[Row], folder: Path) -> str:
    """The text with every block rendered anew. ValueError for a block whose name is unknown or that is not closed."""
    opened = re.findall(r"<!-- bench:([a-z-]+) -->", text)
    closed = [match.group(2) for match in BLOCK.finditer(text)]
    if opened != closed:
        raise ValueError(f"markers opened: {opened}, closed by <!-- /bench -->: {closed}; each needs its own end")
    unknown = sorted(set(opened) - set(TABLES))
    if unknown:
        raise ValueError(f"unknown tables {', '.join(unknown)}; there are {', '.join(TABLES)}")
    return BLOCK.sub(lambda match: _block(match, rows, folder), text)


def _block(match: re.Match[str], rows: list[Row], folder: Path) -> str:
    return f"{match[1]}{TABLES[match[2]](rows, folder).strip()}\n\n{match[3]}"


def main(argv: list[str] | None = None) -> int:
    """0; 1 when `--check` finds a stale file."""
    parser = argparse.ArgumentParser(prog="bench/table.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail when a table is stale")
    parser.add_argument("--results", type=Path, default=FOLDER)
    parser.add_argument("files", nargs="*", type=Path, default=list(FILES))
    args = parser.parse_args(argv)
    rows = latest(read_all(args.results))
    stale = []
    for path in args.files:
        old = path.read_text()
        new = fill(old, rows, args.results)
        if new != old:
            stale.append(path.name if path.parent == REPO else f"{path.parent.name}/{path.name}")
            if not args.check:
                path.write_text(new)
    if args.check and stale:
        print(f"stale: {', '.join(stale)}; run python bench/table.py", file=sys.stderr)
        return 1
    print(f"{'stale' if args.check else 'updated'}: {', '.join(stale) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
