"""Files of users: what is written equals `recommend`, filters and reasons hold, refusals name file and row."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from mmkd import BipartiteGraph, ops
from mmkd.cli import app
from mmkd.data import DataError
from mmkd.serving import FORMATS, RunLoadError, load, load_explainer, read_item_list, recommend_file
from mmkd.serving import batch as batch_module
from mmkd.serving import ranking as ranking_module
from mmkd.serving.ranking import Ranking
from tests.test_serving import IDS, ITEMS, USERS, WIDTH, write_run

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
runner = CliRunner()
LAYERS = 3


def explained_run(path, kind: str = "text", layers: int = LAYERS):
    """A run whose final tables are the propagation of its layer-0 tables, with validation items among the seen ones."""
    write_run(path, kind)
    generator = torch.Generator().manual_seed(1)
    train = sp.random(USERS, ITEMS, 0.2, format="csr", dtype=np.float32, rng=np.random.default_rng(1))
    train.data[:] = 1
    val = sp.random(USERS, ITEMS, 0.1, format="csr", dtype=np.float32, rng=np.random.default_rng(2))
    val.data[:] = 1
    val = sp.csr_matrix(val - val.multiply(train))
    val.eliminate_zeros()
    table = torch.randn(USERS + ITEMS, WIDTH, generator=generator)
    final = ops.propagate(BipartiteGraph.from_scipy(train), table, layers)
    names = ("user_emb", "item_emb", "user_emb0", "item_emb0")
    parts = (*final.split([USERS, ITEMS]), *table.split([USERS, ITEMS]))
    save_file({n: t.contiguous() for n, t in zip(names, parts, strict=True)}, path / "student.safetensors")
    sp.save_npz(path / "seen.npz", sp.csr_matrix(train + 2 * val))
    (path / "config.yaml").write_text(f"student:\n  layers: {layers}\n")
    return train


def write_users(path, users, column="user_id"):
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"other": [0] * len(users), column: users}), path)
    else:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        with open(path, "w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("other", column), *((0, user) for user in users)])
    return path


def read_rows(path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("kind", ["text", "int"])
@pytest.mark.parametrize(("source", "target"), [(".parquet", ".parquet"), (".csv", ".tsv"), (".tsv", ".csv")])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_file_of_users_equals_recommend(tmp_path, monkeypatch, kind, source, target, exclude_seen):
    write_run(tmp_path / "run", kind)
    monkeypatch.setattr(batch_module, "BLOCK", 7)  # several blocks, the last one short
    student = load(tmp_path / "run")
    users = [*IDS[kind][0].tolist()[::-1], IDS[kind][0][3].item()]
    path = write_users(tmp_path / f"users{source}", users)
    done = recommend_file(student, path, tmp_path / f"out{target}", k=6, exclude_seen=exclude_seen)
    rows = read_rows(tmp_path / f"out{target}")
    wanted = [
        {"user": user, "rank": rank, "item": one.item, "score": one.score, "name": one.name}
        for user, items in zip(users, student.recommend(users, 6, exclude_seen), strict=True)
        for rank, one in enumerate(items, 1)
    ]
    if target != ".parquet":
        wanted = [{name: str(value) for name, value in row.items()} for row in wanted]
        rows = [{**row, "score": str(float(row["score"]))} for row in rows]
    assert rows == wanted and (done.users, done.rows, done.skipped) == (len(users), len(wanted), 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["run", path.name, f"out{target}"])


def test_refusals_name_file_and_row_and_leave_nothing(tmp_path, monkeypatch):
    write_run(tmp_path / "run", "int")
    monkeypatch.setattr(batch_module, "BLOCK", 2)
    student, out = load(tmp_path / "run"), tmp_path / "out.csv"
    path = write_users(tmp_path / "users.csv", [1000, 1007, 1014, 1008, 1021])
    with pytest.raises(DataError, match=r"users\.csv: row 4: user '1008' is not among the 30 users .* near it: 1007"):
        recommend_file(student, path, out)
    assert not out.exists()
    done = recommend_file(student, path, out, k=3, skip_unknown=True)
    assert (done.users, done.skipped) == (4, 1)
    write_users(path, [1000, ""])
    with pytest.raises(DataError, match=r"users\.csv: row 2 has no user"):
        recommend_file(student, path, out)
    pq.write_table(pa.table({"user": [1000, None]}), tmp_path / "users.parquet")
    with pytest.raises(DataError, match=r"users\.parquet: row 2 has no user"):
        recommend_file(student, tmp_path / "users.parquet", out)
    write_users(path, [1000], column="buyer")
    with pytest.raises(DataError, match="no user column: expected user or user_id, found other, buyer"):
        recommend_file(student, path, out)
    assert recommend_file(student, path, out, column="buyer", k=1).users == 1
    (tmp_path / "users.parquet").write_bytes(b"user\n1000\n")
    with pytest.raises(DataError, match="not what its name says"):
        recommend_file(student, tmp_path / "users.parquet", out)
    path.write_text("user,other\n1000,1\n1007\n")
    with pytest.raises(DataError, match=r"users\.csv: cannot be read"):
        recommend_file(student, path, out)
    for source, target, fragment in (("users.txt", out, "users: expected a file ending in"), (path, "o.json", "out: ")):
        with pytest.raises(DataError, match=fragment):
            recommend_file(student, source, target)
    assert len(read_rows(out)) == 0  # the last whole result: user 1000 has every item


@pytest.mark.parametrize("kind", ["text", "int"])
def test_allow_and_deny(tmp_path, kind):
    user_emb, item_emb, seen = write_run(tmp_path / "run", kind)
    user_ids, item_ids = IDS[kind]
    student = load(tmp_path / "run")
    allowed, denied = [30, 2, 17, 9, 5], [9, 1]
    (tmp_path / "allow.txt").write_text("\n".join(str(item_ids[i]) for i in allowed) + "\n")
    write_users(tmp_path / "deny.csv", [str(item_ids[i]) for i in denied] + ["77777"], column="item_id")
    lists = {"allow": read_item_list(tmp_path / "allow.txt"), "deny": read_item_list(tmp_path / "deny.csv")}
    for chosen in ({"allow"}, {"deny"}, {"allow", "deny"}):
        pool = set(allowed if "allow" in chosen else range(ITEMS)) - set(denied if "deny" in chosen else ())
        view = student.restricted(**{name: lists[name] for name in chosen})
        for row, got in enumerate(view.recommend(user_ids, 4)):
            scores = user_emb[row] @ item_emb.T
            order = sorted((i for i in pool if not seen[row, i]), key=lambda i, s=scores: (-s[i], i))[:4]
            assert [one.item for one in got] == item_ids[order].tolist()
    with pytest.raises(ValueError, match="allow: 'nothing' is not among the 40 items of this run"):
        student.restricted(allow=["nothing"])
    with pytest.raises(ValueError, match="none of the 40 items is left"):
        student.restricted(deny=item_ids)
    (tmp_path / "bad.txt").write_text("a\n\n")
    with pytest.raises(DataError, match=r"bad\.txt: line 2 is empty"):
        read_item_list(tmp_path / "bad.txt")


@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize("restricted", [False, True])
def test_the_head_changes_no_result(monkeypatch, spread, restricted):
    """Integer tables, so that ties are many; a spread of norms decides whether the head settles users."""
    monkeypatch.setattr(ranking_module, "HEAD", 16)
    rng = np.random.default_rng(0)
    user_emb = torch.from_numpy(rng.integers(-1, 3, (300, 4)).astype(np.float32))
    factor = np.maximum(np.rint(np.exp(spread * rng.standard_normal((500, 1)))), 1).astype(np.float32)
    item_emb = torch.from_numpy(rng.integers(-2, 3, (500, 4)).astype(np.float32) * factor)
    seen = sp.random(300, 500, 0.2, format="csr", dtype=np.float32, rng=rng)
    pool = np.flatnonzero(rng.random(500) < 0.7) if restricted else None
    rows, open_users = rng.integers(0, 300, 400), []
    ranking = Ranking(user_emb, item_emb, seen, pool)
    whole = ranking._whole.topk
    monkeypatch.setattr(ranking._whole, "topk", lambda t, u, *a: open_users.append(len(u)) or whole(t, u, *a))
    scores = (user_emb @ item_emb.T).numpy()
    for exclude_seen in (True, False):
        got = ranking.topk(rows, 5, exclude_seen)
        hidden = seen.toarray() > 0 if exclude_seen else np.zeros(seen.shape, bool)
        for row, values, items in zip(rows, *got, strict=True):
            left = [i for i in (range(500) if pool is None else pool.tolist()) if not hidden[row, i]]
            best = sorted(left, key=lambda i, s=scores[row]: (-s[i], i))[:5]
            assert items.tolist() == best and values.tolist() == scores[row, best].tolist()
    assert (open_users[0] < 380) == (spread > 0), open_users


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_a_score_is_the_sum_of_its_reasons(tmp_path, layers):
    """Against the definition: silence one train edge's message at the last layer and see what the score loses."""
    train = explained_run(tmp_path / "run", layers=layers)
    student, explainer = load(tmp_path / "run"), load_explainer(tmp_path / "run")
    items = np.array([7, 0, 33])
    table = torch.cat([explainer_table(tmp_path / "run", name) for name in ("user_emb0", "item_emb0")]).double()
    adjacency = sp.bmat([[None, train], [train.T, None]]).toarray()
    degree = adjacency.sum(1)
    scale = np.divide(1, np.sqrt(degree), where=degree > 0, out=np.zeros_like(degree))
    normal = torch.from_numpy(scale[:, None] * adjacency * scale).double()
    for user in range(USERS):
        near, parts, own = explainer.contributions(user, items)
        assert near.tolist() == train[user].indices.tolist()
        scores = (student.user_emb[user] @ student.item_emb[items].T).numpy()
        np.testing.assert_allclose(own + parts.sum(1), scores, rtol=1e-4, atol=1e-5)
        for place, j in enumerate(near):
            lost, layer = torch.zeros(WIDTH, dtype=torch.float64), table
            for _ in range(layers):
                lost, layer = lost + normal[user, USERS + j] * layer[USERS + j], normal @ layer
            expected = (lost / (layers + 1)) @ student.item_emb[items].T.double()
            np.testing.assert_allclose(parts[:, place], expected, rtol=1e-4, atol=1e-5)


def explainer_table(run, name):
    from safetensors.torch import load_file

    return load_file(run / "student.safetensors")[name]


def test_reasons_in_a_file(tmp_path):
    explained_run(tmp_path / "run", "int")
    student, explainer = load(tmp_path / "run"), load_explainer(tmp_path / "run")
    users = IDS["int"][0].tolist()
    path = write_users(tmp_path / "users.csv", users)
    recommend_file(student, path, tmp_path / "out.parquet", k=4, explainer=explainer, reasons=12)
    rows = iter(read_rows(tmp_path / "out.parquet"))
    for user, (_, items) in zip(range(USERS), zip(*student.topk(np.arange(USERS), 4), strict=True), strict=True):
        for reasons in explainer.reasons(user, items[items >= 0], 12):
            row = next(rows)
            got = [(row[f"because_{n}"], row[f"because_{n}_score"]) for n in range(1, 13)]
            padded = [(one.item, np.float32(one.score)) for one in reasons] + [(None, None)] * (12 - len(reasons))
            assert got == padded
    assert next(rows, None) is None


def test_a_run_that_cannot_be_explained_says_so(tmp_path):
    write_run(tmp_path)
    with pytest.raises(RunLoadError, match="cannot be explained"):
        load_explainer(tmp_path)
    explained_run(tmp_path)
    seen = sp.load_npz(tmp_path / "seen.npz")
    seen.data[:] = 1  # as if validation items had been trained on
    sp.save_npz(tmp_path / "seen.npz", seen)
    with pytest.raises(RunLoadError, match="not the propagation of the layer-0 tables"):
        load_explainer(tmp_path)


def test_command_line(tmp_path):
    run, ids = tmp_path / "run", IDS["text"]
    explained_run(run)
    write_users(tmp_path / "users.csv", ids[0].tolist())
    (tmp_path / "deny.txt").write_text(f"{ids[1][0]}\n{ids[1][1]}\n")
    files = ["--users", str(tmp_path / "users.csv"), "--out", str(tmp_path / "out.parquet")]
    result = runner.invoke(
        app, ["recommend", str(run), *files, "-k", "5", "--deny", str(tmp_path / "deny.txt"), "--explain"]
    )
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / "out.parquet")
    assert len(rows) == 5 * USERS and not {row["item"] for row in rows} & set(ids[1][:2].tolist())
    assert all(row["because_1"] for row in rows)
    printed = runner.invoke(app, ["recommend", str(run), "--user", ids[0][4], "-k", "2", "--include-seen", "--explain"])
    assert printed.exit_code == 0 and printed.output.count("because ") == 2
    for arguments, message in (
        (files[:2], "--users and --out go together"),
        ([], "name the users either with --user ID"),
        ([*files, "--user", "x"], "name the users either with --user ID"),
    ):
        result = runner.invoke(app, ["recommend", str(run), *arguments])
        assert result.exit_code == 1 and message in " ".join(result.output.split())


@pytest.mark.parametrize("to", FORMATS)
def test_export_from_the_command_line(tmp_path, to):
    from mmkd.serving import load_export

    pytest.importorskip({"faiss": "faiss", "onnx": "onnx"}.get(to, "safetensors"))
    user_emb, _, _ = write_run(tmp_path / "run")
    result = runner.invoke(app, ["export", str(tmp_path / "run"), "--to", to])
    assert result.exit_code == 0, result.output
    got = load_export(result.stdout.strip().replace("\n", ""))
    np.testing.assert_array_equal(got.user_emb, user_emb)
    np.testing.assert_array_equal(got.item_ids, IDS["text"][1])


def test_the_command_line_offers_every_format():
    from mmkd.cli.export import Format

    assert [one.value for one in Format] == list(FORMATS)
