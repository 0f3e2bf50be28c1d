"""What changed between two records, beyond noise.

Two timings differ beyond noise where their ranges from the 20th to the 80th percentile have nothing in common: six
calls of ten of one record then all took longer than six of ten of the other. Memory differs where it is 5 % and 1 MB
more or less.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vpfast.benchmarks.measure import is_floor
from vpfast.benchmarks.problem import OWN, Row
from vpfast.benchmarks.record import Record, markdown_table, three_digits

MEMORY_SHARE, MEMORY_BYTES = 0.05, 1_000_000


@dataclass(frozen=True)
class Change:
    """Of one contender of one case: ``before`` and ``after`` in ms or MB, beyond noise."""

    case: str
    contender: str
    what: str
    before: float
    after: float

    @property
    def times(self) -> float:
        """Above 1 it became slower, or takes more."""
        return self.after / self.before if self.before else float("inf")

    @property
    def worse(self) -> bool:
        """Is it vpfast that became slower or takes more?"""
        return self.contender.startswith(OWN) and self.after > self.before


@dataclass(frozen=True)
class Comparison:
    """``changes`` beyond noise; ``compared`` timings that both records hold; ``remarks`` on what cannot be compared."""

    changes: Sequence[Change]
    compared: int
    remarks: Sequence[str]

    @property
    def worse(self) -> bool:
        return any(change.worse for change in self.changes)


def compare(before: Record, after: Record) -> Comparison:
    """What changed from one record to the other.

    Raises:
        ValueError: records of two benchmarks or devices, a rehearsal beside a measurement, or no timing in common.
    """
    for key, what in (("name", "benchmark"), ("device", "device"), ("rehearsed", "rehearsal")):
        if before.get(key) != after.get(key):
            raise ValueError(f"the records are not of one {what}: {before.get(key)} and {after.get(key)}")
    rows = [_timed(record) for record in (before, after)]
    both = [key for key in rows[0] if key in rows[1]]
    if not both:
        raise ValueError("the records have no timing of one case and contender in common")
    changes = [change for key in both for change in _changes(key, rows[0][key], rows[1][key])]
    return Comparison(changes, len(both), list(_remarks(before, after, rows, changes)))


def _timed(record: Record) -> dict[tuple[str, str], Row]:
    """Rows with a range, by case and contender."""
    return {
        (row["case"], row["contender"]): row
        for row in record["rows"]
        if all(key in row for key in ("p20_ms", "p50_ms", "p80_ms"))
    }


def _changes(key: tuple[str, str], before: Row, after: Row) -> Iterator[Change]:
    if before["p80_ms"] < after["p20_ms"] or after["p80_ms"] < before["p20_ms"]:
        yield Change(*key, "ms", before["p50_ms"], after["p50_ms"])
    peaks = before.get("peak_bytes"), after.get("peak_bytes")
    if peaks[0] is not None and peaks[1] is not None:
        moved = abs(peaks[1] - peaks[0])
        if moved > MEMORY_BYTES and moved > MEMORY_SHARE * peaks[0]:
            yield Change(*key, "peak MB", peaks[0] / 1e6, peaks[1] / 1e6)


def _remarks(
    before: Record, after: Record, rows: Sequence[dict[tuple[str, str], Row]], changes: Sequence[Change]
) -> Iterator[str]:
    machines = before["machine"], after["machine"]
    for key in sorted({*machines[0], *machines[1]} - {"commit", "date", "vpfast"}):
        if machines[0].get(key) != machines[1].get(key):
            yield f"another {key}: {machines[0].get(key)}, then {machines[1].get(key)}"
    floors = [change for change in changes if is_floor(change.contender)]
    if floors:
        share = sum(is_floor(contender) for _, contender in rows[0])
        yield (
            f"copies and matrix products, which no revision changes, changed themselves in {len(floors)} of {share} "
            "timings: the machine was not the same, or not as quiet"
        )
    for which, own, other in (("first", rows[0], rows[1]), ("second", rows[1], rows[0])):
        alone = [f"{case}: {contender}" for case, contender in own if (case, contender) not in other]
        if alone:
            some = "; ".join(alone[:5]) + ("; ..." if len(alone) > 5 else "")
            yield f"in the {which} record alone ({len(alone)}): {some}"


def told(before: Record, after: Record, comparison: Comparison) -> str:
    """The comparison as markdown."""
    revisions = " and ".join(str(record["machine"].get("commit", "unknown")) for record in (before, after))
    lines = [f"# {before['name']}: {revisions}", ""]
    slower = [change for change in comparison.changes if change.worse]
    lines.append(
        f"{comparison.compared} timings compared; {_counted(comparison.changes)} beyond noise, of vpfast's own "
        f"{len(slower)} for the worse. Noise: the ranges from the 20th to the 80th percentile of both records meet "
        f"(memory: less than {MEMORY_SHARE:.0%} or 1 MB apart)."
    )
    rows = [
        [
            change.case,
            change.contender,
            change.what,
            three_digits(change.before),
            three_digits(change.after),
            f"{change.times:.2f}x",
        ]
        for change in sorted(comparison.changes, key=_order)
    ]
    if rows:
        lines += ["", markdown_table(["case", "contender", "", "before", "after", "change"], rows)]
    lines += ["", *(f"- {remark}" for remark in comparison.remarks)] if comparison.remarks else []
    return "\n".join(lines)


def _counted(changes: Sequence[Change]) -> str:
    return "1 change" if len(changes) == 1 else f"{len(changes)} changes"


def _order(change: Change) -> tuple[bool, bool, float]:
    """What got worse of vpfast's first, floors last; the largest factors first."""
    factor = max(change.times, 1 / change.times if change.times else float("inf"))
    return is_floor(change.contender), not change.worse, -factor
