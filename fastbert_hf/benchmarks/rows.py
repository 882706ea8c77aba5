"""One row of a benchmark: what was timed, how long it took, against what, and whether its result was right."""

import math
from dataclasses import asdict, dataclass

from fastbert_hf.benchmarks.timing import Timing


@dataclass
class Row:
    """A measured entry. Times in milliseconds a call; `speedup` is the baseline's median over this one's."""

    section: str
    case: str
    entry: str
    entry_point: str  # how it was called: C call, module call, function call
    tokens: int
    threads: int
    dtype: str
    inputs: str
    median_ms: float
    spread: float
    baseline: str
    speedup: float
    match: str
    bound_share: float | None = None
    busy: bool = False

    @property
    def us_per_token(self) -> float:
        return self.median_ms * 1e3 / self.tokens

    def as_dict(self) -> dict:
        return {**asdict(self), "us_per_token": self.us_per_token}

    @classmethod
    def from_dict(cls, fields: dict) -> "Row":
        return cls(**{name: value for name, value in fields.items() if name != "us_per_token"})


def make_rows(
    timings: dict[str, Timing],
    baseline: str,
    matches: dict[str, str],
    bounds: dict[str, float] | None = None,
    **common,
) -> list[Row]:
    """Rows of entries timed together.

    Args:
        timings, matches: by entry; an entry is named "name (entry point)".
        baseline: the entry that the others are compared with.
        bounds: seconds that an entry needs at least, by entry.
        common: the fields that all rows share.
    """
    reference = timings[baseline].median
    rows = []
    for name, timing in timings.items():
        entry, _, point = name.rstrip(")").partition(" (")
        bound = (bounds or {}).get(name)
        rows.append(
            Row(
                entry=entry,
                entry_point=point or "function call",
                median_ms=timing.median * 1e3,
                spread=timing.spread,
                baseline=baseline.partition(" (")[0],
                speedup=reference / timing.median,
                match=matches.get(name, ""),
                bound_share=None if bound is None else bound / timing.median,
                busy=timing.busy,
                **common,
            )
        )
    return rows


def format_table(rows: list[Row]) -> str:
    """A Markdown table."""
    titles = "case|entry|called as|N|threads|dtype|inputs|ms|±|µs/token|speed-up|of bound|match"
    lines = [f"|{titles}|", "|---" * (titles.count("|") + 1) + "|"]
    for row in rows:
        share = "" if row.bound_share is None or math.isnan(row.bound_share) else f"{row.bound_share:.0%}"
        cells = (
            row.case,
            row.entry,
            row.entry_point,
            row.tokens,
            row.threads,
            row.dtype,
            row.inputs,
            f"{row.median_ms:.4g}{' (busy)' if row.busy else ''}",
            f"{row.spread:.0%}",
            f"{row.us_per_token:.4g}",
            f"{row.speedup:.4g}",
            share,
            row.match,
        )
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)
