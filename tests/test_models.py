"""Prompt, teacher and the frozen-teacher collapse against the formulas of spec section 3, written out in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmkd import BipartiteGraph, ops
from mmkd.models import neighbors
from mmkd.models.features import FeatureTable, project
from mmkd.models.lightgcn import LightGCN, initial_table, matching_table
from mmkd.models.neighbors import neighbor_graph
from mmkd.models.prompt import Prompt, principal_components, prompt_basis
from mmkd.models.teacher import Teacher
from mmkd.training.collapse import FrozenTeacher

D, WIDTHS = 6, (9, 14, 7)


@pytest.fixture
def graph():
    rng = np.random.default_rng(1)
    return BipartiteGraph.from_edges(rng.integers(0, 25, 160), rng.integers(0, 18, 160), 26, 19)


def make_teacher(graph, norm="mean", strength=0.7, feature_layers=1, seed=0):
    rng = np.random.default_rng(seed)
    tables = [
        FeatureTable(f"m{w}", rng.standard_normal((graph.num_items, w)), mode, torch.float64)
        for w, mode in zip(WIDTHS, ("standardize", "unit", "center"), strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    prompt = Prompt(prompt_basis(tables, D).double(), generator)
    with torch.no_grad():
        prompt.bias.normal_(generator=generator)
    teacher = Teacher(
        graph, tables, prompt, layers=2, feature_layers=feature_layers, feature_weight=0.4, strength=strength, norm=norm,
        generator=generator, neighbors=[neighbor_graph(table.prepared(), 3) for table in tables[:2]],
    )  # fmt: skip
    with torch.no_grad():
        for bias in teacher.biases:
            bias.normal_(generator=generator)
    return teacher.double()


def dense_neighbors(x, k):
    """`D^-1/2 S D^-1/2` of :class:`mmkd.models.neighbors.NeighborGraph`, `[I, I]`."""
    unit = torch.nn.functional.normalize(x.double(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-2)
    s = torch.zeros_like(cosine).scatter_(1, cosine.topk(k, dim=1).indices, 1)
    s = ((s + s.T) > 0).double()
    scale = s.sum(1).rsqrt()
    return scale[:, None] * s * scale


def written_out(teacher, graph):
    """Every array of spec section 3 built in full, p^m included."""
    scale = graph.scale_as(torch.float64)
    r = (
        scale[: graph.num_users, None]
        * torch.from_numpy(graph.to_scipy().toarray()).double()
        * scale[graph.num_users :]
    )
    p = teacher.prompt.basis @ teacher.prompt.weight + teacher.prompt.bias
    a = torch.zeros(graph.num_nodes, graph.num_nodes, dtype=torch.float64)
    a[: graph.num_users, graph.num_users :], a[graph.num_users :, : graph.num_users] = r, r.T
    table = teacher.table.clone()
    for features in teacher.features[:2]:
        table[graph.num_users :] += dense_neighbors(features.prepared(), 3) @ teacher.table[graph.num_users :]
    joint = sum(torch.linalg.matrix_power(a, layer) @ table for layer in range(3)) / 3
    users, items = [], []
    parts = zip(teacher.features, teacher.weights, teacher.biases, teacher.omega, strict=True)
    for table, w, b, omega in parts:
        x = torch.cat(list(table.blocks()))
        pm = p @ (p.T @ x)
        pm = pm / graph.num_items if teacher.norm == "mean" else pm / pm.norm(dim=1, keepdim=True).clamp_min(1e-12)
        f = (x + teacher.strength * pm) @ w + b
        for _ in range(teacher.feature_layers):
            fu = r @ f
            f = r.T @ fu
        users.append(fu)
        items.append(f)
        both = torch.cat([fu, f])
        joint = joint + omega * both / both.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return joint, torch.stack(users), torch.stack(items)


@pytest.mark.parametrize("norm", ["mean", "row"])
@pytest.mark.parametrize("feature_layers", [1, 2])
def test_teacher_equals_the_written_out_formulas(graph, norm, feature_layers):
    teacher = make_teacher(graph, norm, feature_layers=feature_layers)
    out, truth = teacher(), written_out(teacher, graph)
    for ours, wanted in zip((out.joint, out.users, out.items), truth, strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=0)
    rows = torch.tensor([0, 3, 25, 26, 30, 44])
    some = teacher(rows, 3)
    torch.testing.assert_close(some.joint, out.joint[rows])
    torch.testing.assert_close(some.items, out.items[:, rows[3:] - graph.num_users])


@pytest.mark.parametrize("norm", ["mean", "row"])
@pytest.mark.parametrize("feature_layers", [1, 2])
def test_some_items_alone_give_the_same_bits_forward_and_backward(graph, norm, feature_layers):
    rows, seen = torch.tensor([0, 3, 25, 26, 30, 44]), []
    mask = torch.rand(graph.num_items, len(WIDTHS) * D, generator=torch.Generator().manual_seed(0)).double()
    for item_rows in (None, graph.item_rows(rows[3:] - graph.num_users)):
        teacher = make_teacher(graph, norm, feature_layers=feature_layers)
        out = teacher(rows, 3, mask, item_rows)
        loss = sum(((i + 1.5) * x).square().sum() for i, x in enumerate((out.joint, out.users, out.items)))
        loss.backward()
        seen.append([out.joint, out.users, out.items, *(p.grad for p in teacher.parameters() if p.requires_grad)])
    assert len(seen[0]) > 8 and all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("norm", ["mean", "row"])
@pytest.mark.parametrize("feature_layers", [1, 2])
def test_collapse_equals_the_teacher_in_values_and_prompt_gradients(graph, norm, feature_layers):
    teacher = make_teacher(graph, norm, 0.7, feature_layers)
    frozen = FrozenTeacher(teacher)
    rows = torch.tensor([1, 4, 20, 26, 27, 40])
    seen = []
    for model in (teacher, frozen):
        out = model(rows, 3)
        loss = out.joint.sin().sum() + out.users.square().sum() + out.items.cos().sum()
        grads = torch.autograd.grad(loss, [teacher.prompt.weight, teacher.prompt.bias])
        seen.append((out.joint, out.users, out.items, *grads))
    for ours, wanted in zip(seen[1], seen[0], strict=True):
        assert (ours - wanted).abs().max() <= 1e-10 * max(1.0, wanted.abs().max().item())
    assert seen[0][3].abs().max() > 1e-6 and seen[0][4].abs().max() > 1e-6  # the check compares something


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("norm", ["mean", "row"])
def test_what_a_step_asks_of_the_collapsed_teacher_equals_the_teachers(graph, norm, learns):
    teacher = make_teacher(graph, norm)
    frozen = FrozenTeacher(teacher, learn_prompt=learns)
    users, candidates = torch.tensor([3, 0, 3, 25]), torch.tensor([[1, 4], [0, 18], [1, 1], [7, 2]])
    pos, neg, further = candidates[:, 0], candidates[:, 1], torch.tensor([2, 30, 2])
    seen = []
    for collapsed in (False, True):
        if collapsed:
            nodes = torch.cat([users, pos + graph.num_users, neg + graph.num_users, further])
            out = frozen.asked(nodes, candidates, frozen.state())
        else:
            full = teacher()
            logits = torch.einsum("mbd,mbkd->mbk", full.users[:, users], full.items[:, candidates])
            user, items = full.joint[users], full.joint[graph.num_users :]
            features = torch.cat([full.users, full.items], 1)
            out = (user * (items[pos] - items[neg])).sum(1), logits, features[:, further]
        prompt = [teacher.prompt.weight, teacher.prompt.bias]
        loss = sum(part.sin().sum() for part in out)
        seen.append((*out, *(torch.autograd.grad(loss, prompt) if learns or not collapsed else ())))
    for ours, wanted in zip(seen[1], seen[0], strict=learns):
        assert (ours - wanted).abs().max() <= 1e-10 * max(1.0, wanted.abs().max().item())
    assert seen[0][3].abs().max() > 1e-6
    assert frozen.asked(torch.cat([users, pos, neg]), candidates, frozen.state(), lists=False)[1] is None


def test_collapse_without_a_prompt_is_a_constant(graph):
    teacher = make_teacher(graph, strength=0.0)
    frozen = FrozenTeacher(teacher)()
    assert not frozen.joint.requires_grad
    torch.testing.assert_close(frozen.joint, teacher().joint.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("norm", ["mean", "row"])
def test_collapse_keeps_nothing_as_wide_as_the_features_and_no_second_table(graph, norm):
    frozen = FrozenTeacher(make_teacher(graph, norm))
    assert all(b.shape[-1] <= D + 1 for name, b in frozen.named_buffers() if name != "mixed")
    assert frozen.mixed.numel() == len(WIDTHS) * (D + 1) * D  # of all modalities, side by side or one after another
    held = sum(b.numel() for name, b in frozen.named_buffers() if b.dim() > 1 and b.shape[-2] >= graph.num_items)
    design = D + 1 if norm == "mean" else 0
    assert held <= graph.num_nodes * (D * len(WIDTHS) + D + design) + graph.num_items * (D + 1)


def test_the_prompt_s_state_is_differentiable_twice_under_transforms_and_in_autocast(graph):
    frozen = FrozenTeacher(make_teacher(graph))
    weight = frozen.prompt.weight
    (slope,) = torch.autograd.grad(frozen.state().square().sum(), weight, create_graph=True)
    (curve,) = torch.autograd.grad(slope.square().sum(), weight)
    share = frozen.strength / graph.num_items

    def plain(w):
        stacked = torch.cat([w, frozen.prompt.bias[None]])
        moments = frozen.mixed.view(D + 1, len(WIDTHS), D).transpose(0, 1) / share
        return (share * (stacked @ stacked.T) @ moments).square().sum()

    (true_slope,) = torch.autograd.grad(plain(weight), weight, create_graph=True)
    torch.testing.assert_close(slope, true_slope)
    torch.testing.assert_close(curve, torch.autograd.grad(true_slope.square().sum(), weight)[0])

    def of_weight(w):
        return torch.func.functional_call(frozen, {"prompt.weight": w}).joint.square().sum()

    transformed = torch.func.grad(of_weight)(weight.detach())
    torch.testing.assert_close(transformed, torch.autograd.grad(frozen().joint.square().sum(), weight)[0])
    frozen.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state = frozen.state()
    state.float().square().sum().backward()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad - slope).norm() < 0.05 * slope.norm()


@pytest.mark.parametrize("norm", ["mean", "row"])
def test_a_prompt_that_does_not_learn_is_folded_into_the_constants(graph, norm):
    teacher = make_teacher(graph, norm)
    frozen, out = FrozenTeacher(teacher, learn_prompt=False), teacher()
    assert not frozen.strength
    ours = frozen()
    for mine, wanted in zip((ours.joint, ours.users, ours.items), (out.joint, out.users, out.items), strict=True):
        assert not mine.requires_grad
        torch.testing.assert_close(mine, wanted.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["raw", "center", "standardize", "unit"])
@pytest.mark.parametrize("stored", [np.float16, np.float32, np.int16, ">f4"], ids=str)
def test_projection_from_the_stored_type_equals_the_prepared_product(mode, stored):
    x = (np.random.default_rng(0).standard_normal((70, 9)) * 4 + 6).astype(stored)
    table = FeatureTable("x", x, mode)
    assert table.values.dtype != torch.float32 or np.shares_memory(table.values.numpy(), x) or stored == ">f4"
    prepared = torch.cat(list(table.blocks(16, torch.float64)))
    weight = torch.randn(9, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
    direction = torch.randn(70, 5, generator=torch.Generator().manual_seed(2))
    ours = table.project(weight)
    torch.testing.assert_close(ours.double(), prepared @ weight.double(), atol=2e-5, rtol=1e-5)
    grad = torch.autograd.grad((ours * direction).sum(), weight)[0]
    torch.testing.assert_close(grad.double(), prepared.T @ direction.double(), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("added", [None, 1, 4], ids=["nothing added", "bias", "design"])
@pytest.mark.parametrize("mode", ["raw", "standardize", "unit"])
def test_one_pass_and_library_products_agree(mode, added):
    """Tables that a kernel reads where they lie, and the same in column-major order, which it does not take."""
    rng, g = np.random.default_rng(0), torch.Generator().manual_seed(1)
    arrays = [rng.standard_normal((70, k)) + 3 for k in (9, 5)]
    rows, columns = (
        [FeatureTable("x", make(x), mode, torch.float64) for x in arrays] for make in (np.array, np.asfortranarray)
    )
    assert all(t.in_place for t in rows) and not any(t.in_place for t in columns)
    weights = [torch.randn(k, 6, generator=g, dtype=torch.float64).requires_grad_() for k in (9, 5)]
    mask = (torch.rand(70, 12, generator=g) > 0.2).double()
    given, leaves = {"mask": mask}, weights
    if added is not None:
        design = torch.randn(70, added, generator=g, dtype=torch.float64)
        design[:, -1] = 1
        given |= {"design": design, "added": torch.randn(added, 12, generator=g, dtype=torch.float64).requires_grad_()}
        leaves = [*weights, given["added"]]
    outputs = [project(tables, weights, **given) for tables in (rows, columns)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), leaves) for out in outputs))


@pytest.mark.parametrize("weights", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.float8_e4m3fn, torch.int8], ids=str)
def test_any_stored_type_goes_with_any_weights(stored, weights):
    x = torch.randint(-4, 4, (50, 9), generator=torch.Generator().manual_seed(0)).to(stored)
    w = torch.randn(9, 6, generator=torch.Generator().manual_seed(1)).to(weights)
    for values in (x, torch.nn.Parameter(x, requires_grad=stored == torch.float32)):
        out = FeatureTable("x", values, "raw", weights).project(w)
        assert out.dtype == weights
        torch.testing.assert_close(out.double(), x.double() @ w.double(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "mask", [torch.ones(19, 18, dtype=torch.bool), torch.full((19, 18), 2.0), torch.full((19, 1), 2.0)]
)
def test_a_mask_of_another_type_or_of_one_column(graph, mask):
    teacher = make_teacher(graph)
    torch.testing.assert_close(teacher.project(mask=mask), teacher.project() * mask)


@pytest.mark.parametrize("norm", ["mean", "row"])
def test_dropout_is_the_last_thing_a_projection_does(graph, norm):
    teacher = make_teacher(graph, norm)
    mask = (torch.rand(graph.num_items, len(WIDTHS) * D) > 0.3).double() / 0.7
    masked, plain = teacher.project(mask=mask), teacher.project()
    torch.testing.assert_close(masked, plain * mask)
    leaves = [*teacher.weights, *teacher.biases, *teacher.prompt.parameters()]
    ours = torch.autograd.grad(masked.square().sum(), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad((plain * mask).square().sum(), leaves))


def test_bfloat16_products_are_close_even_far_from_zero():
    x = np.random.default_rng(0).standard_normal((300, 40)).astype(np.float32) + 100
    exact, rounded = (FeatureTable("x", x, "standardize", compute=c) for c in ("float32", "bfloat16"))
    weight = torch.randn(40, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    want, got = exact.project(weight), rounded.project(weight)
    assert (got - want).norm() < 0.01 * want.norm()
    grads = [torch.autograd.grad(out.square().sum(), weight)[0] for out in (want, got)]
    assert 0 < (grads[1] - grads[0]).norm() < 0.01 * grads[0].norm()


def test_mapped_features_stay_on_the_disk(tmp_path):
    x = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    table = FeatureTable("x", mapped)
    assert table.values.dtype == torch.float16 and table.values.data_ptr() == mapped.ctypes.data
    torch.testing.assert_close(table.project(torch.ones(6, 2)), FeatureTable("x", x).project(torch.ones(6, 2)))


def test_principal_components_match_the_singular_vectors_and_are_signed():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 12)) @ rng.standard_normal((12, 12)) + 3.0
    table = FeatureTable("x", x, "raw", torch.float64)
    centred = x - x.mean(0)
    _, _, vt = np.linalg.svd(centred, full_matrices=False)
    vt *= np.sign(vt[np.arange(12), np.abs(vt).argmax(1)])[:, None]
    np.testing.assert_allclose(principal_components(table, 5).numpy(), centred @ vt[:5].T, atol=1e-4)
    with pytest.raises(ValueError, match="modality 'x' has 12 columns, fewer than dim=13"):
        principal_components(table, 13)


def test_wide_features_reach_the_same_components():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 20)) * np.r_[10.0, 8, 6, 4, np.full(16, 0.1)] @ rng.standard_normal((20, 1100))
    table = FeatureTable("wide", x, "raw", torch.float64)
    u, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    sign = np.sign(vt[np.arange(60), np.abs(vt).argmax(1)])
    np.testing.assert_allclose(principal_components(table, 3).numpy(), (u * s * sign)[:, :3], rtol=1e-3, atol=1e-2)


def test_unit_rows_all_count_the_same():
    x = np.random.default_rng(0).standard_normal((50, 4)) * np.geomspace(1e-3, 1e3, 50)[:, None] + 2.0
    unit = FeatureTable("x", x, "unit", torch.float64).prepared()
    torch.testing.assert_close(unit.norm(dim=1), torch.full((50,), 2.0, dtype=torch.float64))
    centred = torch.from_numpy(x - x.mean(0))
    torch.testing.assert_close(unit, 2 * torch.nn.functional.normalize(centred, dim=1))
    assert FeatureTable("x", np.full((3, 4), 7.0), "unit").prepared().eq(0).all()


def test_neighbours_are_looked_for_by_the_features_where_that_is_affordable(monkeypatch):
    table, components = FeatureTable("x", np.random.default_rng(0).standard_normal((30, 8)), "unit"), torch.ones(30, 3)
    assert torch.equal(neighbors.neighbor_vectors(table, components), table.prepared())
    monkeypatch.setattr(neighbors, "AFFORDABLE", 30 * 30 * 8 - 1)
    assert neighbors.neighbor_vectors(table, components) is components


def test_neighbours_are_the_nearest_by_cosine_and_their_product_differentiates():
    x = torch.from_numpy(np.random.default_rng(2).standard_normal((40, 6)))
    graph, truth = neighbor_graph(x, 4), dense_neighbors(x, 4)
    table = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(graph(table), truth @ table, atol=1e-12, rtol=0)
    torch.testing.assert_close(graph(table.float()), (truth @ table).float(), atol=1e-5, rtol=0)
    (grad,) = torch.autograd.grad(graph(table).sin().sum(), table)
    torch.testing.assert_close(grad, truth.T @ (truth @ table).cos(), atol=1e-12, rtol=0)
    x[3] = 0  # an item without features has no neighbours, and is nobody's
    assert graph.rowptr.diff().min() >= 4
    without = neighbor_graph(x, 4)
    assert without.rowptr[3] == without.rowptr[4] and 3 not in without.col
    assert without.scale[3] == 0 and torch.isfinite(without(table)).all()
    assert neighbor_graph(x[:2], 4).col.tolist() == [1, 0]  # fewer than k there


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_the_matching_table_propagates_to_its_target(graph, layers):
    generator = torch.Generator().manual_seed(0)
    reachable = torch.randn(graph.num_nodes, 5, dtype=torch.float64, generator=generator)
    target = ops.propagate(graph, reachable, layers)
    table = matching_table(graph, target, layers, ridge=1e-9, steps=400)
    again = ops.propagate(graph, table, layers)
    assert (again - target).norm() < 1e-3 * target.norm()
    if layers:
        p = ops.propagate(graph, torch.eye(graph.num_nodes, dtype=torch.float64), layers)
        truth = torch.linalg.solve(p @ p + 0.1 * torch.eye(len(p), dtype=torch.float64), p @ target)
        torch.testing.assert_close(matching_table(graph, target, layers, ridge=0.1, steps=200), truth)


def test_feature_modes():
    x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float16) * 3 + 7
    x[:, 2] = 5.0
    standard = torch.cat(list(FeatureTable("x", x, "standardize").blocks(16)))
    torch.testing.assert_close(standard.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    assert standard[:, 2].eq(0).all()
    torch.testing.assert_close(standard.std(0, correction=0)[[0, 1, 3]], torch.ones(3), atol=1e-3, rtol=0)
    assert next(FeatureTable("x", x, "raw").blocks()).equal(torch.from_numpy(x).float())
    with pytest.raises(ValueError, match="mode: expected"):
        FeatureTable("x", x, "whiten")
    with pytest.raises(ValueError, match="compute: expected"):
        FeatureTable("x", x, compute="float8")


def test_lightgcn_rows_and_errors(graph):
    model = LightGCN(graph, initial_table(graph.num_nodes, 8, "xavier", torch.Generator().manual_seed(0)), 2)
    rows = torch.tensor([4, 30, 2])
    torch.testing.assert_close(model(rows), model()[rows])
    users, items = model.tables()
    assert users.shape == (graph.num_users, 8) and items.shape == (graph.num_items, 8)
    with pytest.raises(ValueError, match="table: expected"):
        LightGCN(graph, torch.zeros(3, 8), 2)
    with pytest.raises(ValueError, match="modality 'm': expected 19 rows"):
        Teacher(graph, [FeatureTable("m", np.zeros((4, 9)))], Prompt(torch.zeros(19, 6)))
