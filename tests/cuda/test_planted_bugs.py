"""Proof of the executor: each bug planted in csrc/simt/planted.cpp is caught, and the same kernel without it passes."""

from __future__ import annotations

import json
from functools import lru_cache

import pytest
import simt_build

SEEDS = 20
SCRIPT = f"""
import json, sys, torch, simt
torch.manual_seed(0)
x = torch.randn(4 * 64)
for line in sys.argv[1:]:
    bug, atomic = int(line.split()[0]), line.split()[1] == "total"
    truth = x.double().sum()[None] if atomic else x.double().view(4, 64).sum(1)
    wrong, errors = 0, []
    for seed in range({SEEDS}):
        simt.ops.set_schedule(seed)
        out = torch.zeros(1 if atomic else 4)
        try:
            simt.ops.planted(x, out, bug, atomic)
        except RuntimeError as error:
            errors.append(str(error))
        wrong += not torch.allclose(out.double(), truth, atol=1e-5)
    print(json.dumps({{"case": line, "wrong": wrong, "errors": errors}}))
"""
HARMLESS_TO_THE_PROCESS = ("0 rows", "0 total", "1 rows", "7 total", "4 rows", "5 rows", "6 rows")


@lru_cache(maxsize=1)
def results() -> dict[str, dict]:
    """What came of every planted case that does not end the process."""
    done = simt_build.run(["-c", SCRIPT, *HARMLESS_TO_THE_PROCESS])
    assert done.returncode == 0, done.stderr[:4000]
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("case", ["0 rows", "0 total"])
def test_without_a_bug_every_schedule_is_right(case):
    assert results()[case]["wrong"] == 0 and not results()[case]["errors"]


@pytest.mark.parametrize("case", ["1 rows", "7 total"], ids=["missing barrier", "missing atomic"])
def test_a_race_changes_the_result(case):
    assert results()[case]["wrong"] == SEEDS and not results()[case]["errors"]


@pytest.mark.parametrize(
    ("case", "said"),
    [("4 rows", "divergent warp exchange"), ("5 rows", "divergent barrier"), ("6 rows", "divergent barrier")],
    ids=["shuffle in a branch", "barrier in a branch", "a thread leaves before the barrier"],
)
def test_divergence_is_an_error_that_names_the_line(case, said):
    errors = results()[case]["errors"]
    assert len(errors) == SEEDS
    assert all(said in e and "planted.cpp:" in e for e in errors)


@pytest.mark.parametrize("bug", [2, 3], ids=["global memory", "shared memory"])
def test_an_off_by_one_is_seen_by_the_sanitizer(bug):
    done = simt_build.run(["-c", SCRIPT, f"{bug} rows"])
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "row_sum" in done.stderr and "planted.cpp" in done.stderr
