"""One training step, ours against the eager step of the same mathematics (COO and CSR): batch, forward, backward, AdamW.

The eager twin is handed its batch; its teacher is recomputed in every step of the student's stage, so that the prompt
learns as it does in ours. Closeness of losses and gradients is asserted first.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import floor
import pytest
import steps
import torch

ROUNDS = 3
OUR_STEPS = 8  # to an eager one: an eager step leaves cold caches and an allocator of gigabytes to what follows it
STUDENT_TARGETS = {"tiktok": 25, "netflix": 40, "electronics": 120}


def eager_step(pair: steps.Pair, layout: str) -> Callable[[], None]:
    """The twin's step: its losses in full, backward, AdamW."""
    loss, leaves = pair.eager(layout)
    optimizer = torch.optim.AdamW(leaves, lr=1e-4)
    batches = ((0, s) for s in count())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(*next(batches)).backward()
        optimizer.step()

    return step


def _our_steps(pair: steps.Pair, number: int = OUR_STEPS) -> Callable[[], None]:
    batches = iter([(0, s) for s in range(10_000)])

    def run() -> None:
        for _ in range(number):
            pair.ours(*next(batches))
            pair.optimizer.step()

    return run


@pytest.mark.parametrize("name", STUDENT_TARGETS)
@pytest.mark.parametrize("emb", ["sampled", "all"])
def bench_student_step(compare, name, emb):
    pair = steps.student(name, emb_sample=1024 if emb == "sampled" else None)
    steps.assert_close(pair)
    rivals = {f"eager {layout}": eager_step(pair, layout) for layout in ("csr", "coo")}
    compare("student step", f"{name} L=2, EmbKD {emb}", _our_steps(pair), rivals,
            targets={"eager csr": STUDENT_TARGETS[name]}, rounds=ROUNDS, warmup=1, calls=1, repeats=OUR_STEPS)  # fmt: skip


@pytest.mark.parametrize("name", STUDENT_TARGETS)
def bench_teacher_step(compare, name):
    pair = steps.teacher_step(name)
    steps.assert_close(pair)
    rivals = {f"eager {layout}": eager_step(pair, layout) for layout in ("csr", "coo")}
    row = compare("teacher step", f"{name} L=2", _our_steps(pair), rivals | {"X W and its gradient": steps.gemms(name)},
                  rounds=ROUNDS, warmup=1, calls=1, repeats=OUR_STEPS)  # fmt: skip
    row.target = {"X W and its gradient": 1 / 1.4}  # the step within 1.4x of the products it cannot avoid


@pytest.mark.parametrize("name", ["netflix"])
def bench_student_step_with_row_normalised_prompt(compare, name):
    """`prompt.norm=row` keeps one teacher SpMM in the step; the rival is the same step with `prompt.norm=mean`."""
    row, mean = steps.student(name, norm="row"), steps.student(name)
    compare(
        "student step",
        f"{name} L=2, prompt norm row",
        _our_steps(row),
        {"prompt norm mean": _our_steps(mean)},
        rounds=15,
        calls=1,
    )


@pytest.mark.parametrize("name", STUDENT_TARGETS)
def bench_student_step_with_amp(compare, name):
    """`--amp bf16`: layers gathered in bfloat16; the rival is the same step in float32."""
    narrow, wide = (steps.student(name, compute=kind, emb_sample=1024) for kind in (torch.bfloat16, None))
    compare("student step", f"{name} L=2, amp bf16", _our_steps(narrow, 1), {"float32": _our_steps(wide, 1)},
            rounds=20, warmup=2, calls=4)  # fmt: skip


@pytest.mark.parametrize("name", STUDENT_TARGETS)
def bench_student_step_floor(compare, name):
    """Beside the rows that propagation of one batch reads, and AdamW's tables read and written: nothing else of a step."""
    pair = steps.student(name, emb_sample=1024)
    rows, table = pair.task.batch(0, 0).nodes.rows, pair.parameters[0].detach()
    read = floor.rows_read(floor.propagation(pair.task.graph, rows, table.shape[1]))
    stepped = floor.step_of([table.clone(), torch.zeros_like(table), torch.zeros_like(table)])
    compare("student step", f"{name} L=2, EmbKD sampled, beside its floor", _our_steps(pair, 1),
            {"floor: rows read, tables stepped": floor.both(read, stepped)}, rounds=20, warmup=2, calls=4)  # fmt: skip


@pytest.mark.parametrize("name", STUDENT_TARGETS)
def bench_teacher_step_floor(compare, name):
    """Beside the products alone, the rows that its SpMMs and its ids' propagation read, and AdamW's tables."""
    pair = steps.teacher_step(name)
    drawn, model = pair.task.batch(0, 0), pair.task.model
    graph, dim, table = model.graph, model.table.shape[1], model.table.detach()
    features = floor.spread(graph, drawn.item_rows, len(model.features), dim)
    read = floor.rows_read([*features, *floor.propagation(graph, drawn.nodes.rows, dim)])
    stepped = floor.step_of([table.clone(), torch.zeros_like(table), torch.zeros_like(table)])
    floors = {"floor: products, rows read, tables stepped": floor.both(steps.gemms(name), read, stepped),
              "floor: rows read, tables stepped": floor.both(read, stepped)}  # fmt: skip
    compare("teacher step", f"{name} L=2, beside its floor", _our_steps(pair, 1), floors, rounds=15, warmup=2, calls=4)
