"""Random CSR patterns for hypothesis, and the ways to spoil one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True)
class Pattern:
    """A CSR pattern: `rowptr` int64 `[num_rows + 1]`, `col` int32 or int64 `[nnz]`."""

    rowptr: np.ndarray
    col: np.ndarray
    num_cols: int

    @property
    def num_rows(self) -> int:
        return len(self.rowptr) - 1


@st.composite
def patterns(
    draw, max_rows: int = 12, max_cols: int = 40, full: bool = True, tidy: bool = True, square: bool = False
) -> Pattern:
    """Rows from empty to crowded, at least one entry in all. `tidy`: columns ascending, each once. `full`: a row may hold
    every column."""
    num_rows, num_cols = draw(st.integers(1, max_rows)), draw(st.integers(1 if full else 2, max_cols))
    num_rows = num_cols if square else num_rows
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    most = num_cols if full else num_cols - 1
    lengths = draw(
        st.lists(st.one_of(st.integers(0, min(most, 4)), st.integers(0, most)), min_size=num_rows, max_size=num_rows)
    )
    lengths[0] = max(lengths[0], 1)
    rows = [np.sort(rng.permutation(num_cols)[:n]) if tidy else rng.integers(0, num_cols, n) for n in lengths]
    index = draw(st.sampled_from([np.int32, np.int64]))
    return Pattern(np.cumsum([0, *lengths]), np.concatenate(rows).astype(index), num_cols)


def _falls(draw, p: Pattern) -> Pattern:
    rowptr = np.r_[p.rowptr, p.rowptr[-1]]  # one more, empty row: there is an inner boundary to spoil
    at = draw(st.integers(1, len(rowptr) - 2))
    rowptr[at] = draw(st.sampled_from([-1, -(2**62), rowptr[-1] + 1, 2**31 + 1, 2**62]))
    return replace(p, rowptr=rowptr)


def _ends_elsewhere(draw, p: Pattern) -> Pattern:
    rowptr = p.rowptr.copy()
    rowptr[-1] += draw(st.sampled_from([-1, 1, 2**31, 2**40]))
    return replace(p, rowptr=rowptr)


def _starts_elsewhere(draw, p: Pattern) -> Pattern:
    rowptr = p.rowptr.copy()
    rowptr[0] = draw(st.sampled_from([-1, 1, 2**40]))
    return replace(p, rowptr=rowptr)


def _column_out_of_range(draw, p: Pattern) -> Pattern:
    col = p.col.copy()
    values = [-1, p.num_cols, np.iinfo(col.dtype).min, np.iinfo(col.dtype).max]
    # what an int32 would make of these is in range: they must not be narrowed before they are looked at
    values += [2**32, -(2**32)] if col.dtype == np.int64 else []
    col[draw(st.integers(0, len(col) - 1))] = draw(st.sampled_from(values))
    return replace(p, col=col)


@st.composite
def malformed(draw, square: bool = False) -> Pattern:
    """A pattern with one thing wrong that an op must see before it follows an index."""
    spoil = draw(st.sampled_from([_falls, _ends_elsewhere, _starts_elsewhere, _column_out_of_range]))
    p = spoil(draw, draw(patterns(square=square)))
    return replace(p, num_cols=p.num_rows) if square else p
