"""The comparison page: its numbers, and that a browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.torch import load_file

import mmkd
from mmkd.data import load
from mmkd.evaluation import evaluate
from mmkd.experiments.report import ReportError, bins, coverage, differing, measure, novelty, write_report
from mmkd.models.baselines import TITLES

BASE = {
    "data": {"path": "synthetic", "options": {"num_users": 90, "num_items": 80, "num_interactions": 1600}},
    "dim": 8, "progress": False, "threads": 1, "baselines": ["popularity"], "models": {"bpr-mf": {"lr": 0.02, "eval_every": 1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    short = {"epochs": 3, "eval_every": 1, "batch_size": 256}
    lightgcn = mmkd.train(BASE | {"model": "lightgcn", "lightgcn": {"lr": 0.02} | short}, out=out / "light & warm").path
    models = {"bpr-mf": {"lr": 0.02} | short}
    return [lightgcn, mmkd.train(BASE | {"model": "bpr-mf", "models": models, "seed": 0}, out=out / "factors").path]


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not str(v).startswith("#")]

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, f"{tag} closed out of order"


def test_the_page_is_whole_and_loads_nothing(runs, tmp_path):
    page = write_report(runs, tmp_path / "r.html").read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(page)
    assert not parser.open and not parser.outside and "<script" not in page and "url(http" not in page
    for word in (
        "light &amp; warm",
        "factors",
        "<svg",
        "coverage@20",
        "novelty@20",
        "lightgcn.lr",
        "popularity",
        "validation",
    ):
        assert word in page, word
    assert len(re.findall("<b>", page)) >= 8


def test_its_numbers_are_the_evaluators(runs):
    run = measure(runs[0], "val")
    dataset = load("synthetic", seed=0, **BASE["data"]["options"])
    tables = load_file(runs[0] / "student.safetensors")
    truth = evaluate(tables["user_emb"], tables["item_emb"], dataset, "val", (20,))
    assert run.values["recall@20"] == truth["recall@20"]
    users = np.array([(count, value) for _, count, value in run.users])
    assert np.isclose(np.average(users[:, 1], weights=users[:, 0]), truth["recall@20"])
    assert sum(count for _, count, _ in run.items) == dataset.val.nnz
    assert 0 < run.values["coverage@20"] <= 1 and run.values["novelty@20"] > 0
    assert TITLES["lightgcn"] in run.info["results"]


def test_small_parts():
    where, names = bins(np.array([0, 1, 4, 5, 9, 50, 1000]))
    assert [names[i] for i in where] == ["0", "1-4", "1-4", "5-9", "5-9", "50+", "50+"]
    ranked = np.array([[0, 1], [1, -1]])
    assert coverage(ranked, 4) == 0.5
    assert np.isclose(novelty(ranked, np.array([3, 1, 0, 0]), 3), -np.log2([4 / 4, 2 / 4, 2 / 4]).mean())
    a, b = (mmkd.config.load_config({"seed": s, "teacher": {"lr": 0.01}}) for s in (0, 1))
    assert differing([a, b]) == {"seed": [0, 1]} and not differing([a, a])


def test_refused(runs, tmp_path):
    with pytest.raises(ReportError, match=r"no config\.yaml"):
        write_report([tmp_path], tmp_path / "r.html")
    other = tmp_path / "other"
    shutil.copytree(runs[0], other)
    text = (other / "config.yaml").read_text().replace("num_users: 90", "num_users: 91")
    (other / "config.yaml").write_text(text)
    with pytest.raises(ReportError, match="the data has changed since"):
        write_report([runs[0], other], tmp_path / "r.html")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here (Debian's package `chromium`)")
def test_a_browser_shows_it(runs, tmp_path):
    page = write_report(runs, tmp_path / "r.html")
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'p'}",
    ]
    done = subprocess.run(
        ["chromium", *flags, "--window-size=1300,1900", f"--screenshot={tmp_path / 'r.png'}", page.as_uri()],
        capture_output=True, timeout=120, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-500:]
    assert (tmp_path / "r.png").stat().st_size > 30_000
    from matplotlib.image import imread

    pixels = imread(tmp_path / "r.png")
    assert pixels.shape[:2] == (1900, 1300)
    dark = (pixels[..., :3].mean(2) < 0.5).mean(axis=1)  # share of text per line of the screen
    assert (dark[:900] > 0.005).mean() > 0.1, "the page is blank"
