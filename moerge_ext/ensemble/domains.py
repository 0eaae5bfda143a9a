"""The experts that rows name themselves, for a single-label router."""

from __future__ import annotations


def domains(rows: list[dict], names: list[str]) -> list[int]:
    """The expert id of every row's "domain"; ValueError for rows without one, and for unknown experts."""
    bad = [i for i, row in enumerate(rows) if row.get("domain") not in names]
    if bad:
        raise ValueError(
            f'a single-label router needs rows with "domain", one of {", ".join(names)}; row {bad[0]} (from 0) has '
            f"{rows[bad[0]].get('domain')!r} ({len(bad)} such rows)"
        )
    return [names.index(row["domain"]) for row in rows]
