"""The same small search for every trained model, decided on validation; what it chose goes into all later tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmkd.config import Config, StageConfig
from mmkd.experiments.cells import Study
from mmkd.experiments.parallel import side_by_side
from mmkd.experiments.writing import bars, markdown, write
from mmkd.files import write_json
from mmkd.models.baselines import TITLES, TRAINED

# On sparse data L2 is what decides (BPR-MF on tiktok: recall@20 .033 at 1e-3, .098 at 0.1), so it comes first, then the rate,
# then two settings of the model's own.
L2, RATES = (1e-3, 1e-2, 1e-1), (1e-3, 3e-3)
# A trial ends sooner than the run of the winner will: it only has to tell settings apart.
SHORT = {"epochs": 100, "patience": 4}
SHARED = {"shared_negatives": 256, "l2": 3e-2}
# A name with a dot is a setting outside of the model's own section.
OWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lightgcn": (SHARED, {"layers": 2}),
    "mmkd": (SHARED, {"layers": 2, "student.layers": 2}),
    "bpr-mf": ({"draw": "pairs"}, {"lr": 1e-2}),
    "ngcf": ({"draw": "pairs"}, {"layers": 2}),
    "vbpr": ({"draw": "pairs"}, {"lr": 3e-4}),
    "mmgcn": ({"draw": "users"}, {"layers": 1}),
    "grcn": ({"draw": "pairs"}, {"layers": 3}),
    "lattice": ({"draw": "pairs"}, {"layers": 2}),
    "clcrec": ({"draw": "pairs"}, {"replaced": 0.2}),
    "slmrec": ({"ssl_weight": 0.1}, {"temperature": 0.1}),
    "bm3": ({"layers": 1}, {"dropout": 0.5}),
}
TRIALS = len(L2) + len(RATES) - 1 + 2
SECTION = {"lightgcn": "lightgcn", "mmkd": "teacher"} | {name: f"models.{name}" for name in TRAINED}


class Search:
    """One model's trials, each a change to the best so far: three weights of L2, a higher rate, two of its own.

    Args:
        study: its cells must not see the test part.
        name: a key of `SECTION`.
        metric: of the validation part, larger is better; of equal ones the earlier stays.

    Attributes:
        tried: `(settings, value of the metric)` in order. best: the settings that won, by field name.
    """

    def __init__(self, study: Study, name: str, metric: str) -> None:
        self.study, self.name, self.metric = study, name, metric
        self.tried: list[tuple[dict[str, Any], float]] = []
        own = _section(study.settings({"model": name}, 0), name)
        self.short = {key: min(getattr(own, key), bound) for key, bound in SHORT.items()}

    @property
    def best(self) -> dict[str, Any]:
        return max(self.tried, key=lambda pair: pair[1])[0]

    def run(self, quick: bool = False) -> dict[str, Any]:
        """All trials (the first two if `quick`); returns the winner's settings by dotted path."""
        for weight in L2[:2] if quick else L2:
            self._try({"lr": RATES[0], "l2": weight})
        for changes in () if quick else (*({"lr": rate} for rate in RATES[1:]), *OWN[self.name]):
            self._try(self.best | changes)
        return self._paths(self.best)

    def _paths(self, settings: dict[str, Any]) -> dict[str, Any]:
        section = SECTION[self.name]
        return {key if "." in key else f"{section}.{key}": value for key, value in settings.items()}

    def _try(self, settings: dict[str, Any]) -> None:
        cell = self.study.cell({"model": self.name, **self._paths(self.short | settings)})
        self.tried.append((settings, cell.results[TITLES[self.name]][self.metric]))


def tune(study: Study, models: Sequence[str] = ()) -> Path:
    """Tries every model, or those named, on one seed with the test part taken away; the winners go into `tuned.json`.

    Later cells of the same study start from what was chosen. Models may be searched one by one, in several processes too.
    """
    unknown = sorted(set(models) - set(SECTION))
    if unknown:
        raise ValueError(f"models: expected some of {', '.join(SECTION)}, got {', '.join(unknown)}")
    bare = Study(study.out / "search", study.config, seeds=1, jobs=study.jobs, test=False)
    metric, searches = study.config.evaluation.metric, {}
    bare.stop = study.stop

    def finish(name: str, metric: str, quick: bool) -> None:
        """Runs the trials that are missing and keeps the winner."""
        searches[name] = Search(bare, name, metric)
        _keep(study.out / "tuned.json", name, searches[name].run(quick))

    wanted = [(name, metric, study.quick) for name in models or SECTION]
    if study.jobs > 1 and len(wanted) > 1:
        side_by_side(bare, _search, wanted, "models searched", finish)
    else:
        for arguments in wanted:
            finish(*arguments)
    searches = {name: searches[name] for name, *_ in wanted}  # they end in any order
    body = f"{study.name}, validation {metric}, one seed, the test part not loaded. "
    body += f"{len(next(iter(searches.values())).tried)} trials a model, each a change to the best before it, at most {SHORT['epochs']} epochs, ended after {SHORT['patience']} looks without a better one.\n\n"
    body += markdown(["model", "settings", metric], [row for search in searches.values() for row in _rows(search)])
    records = [
        {"model": TITLES[s.name], "settings": _text(changes), metric: v}
        for s in searches.values()
        for changes, v in s.tried
    ]
    best = {TITLES[s.name]: max(value for _, value in s.tried) for s in searches.values()}
    chart = bars(list(best), list(best.values()), [0.0] * len(best), f"validation {metric}")
    return write(study, "search", "Search: the same budget for every model", body, records, chart)


def _search(study: Study, name: str, metric: str, quick: bool) -> None:
    Search(study, name, metric).run(quick)


def _section(config: Config, name: str) -> StageConfig:
    """The settings of the stage that is searched."""
    if name in TRAINED:
        return TRAINED[name].Settings.model_validate(config.models.get(name, {}))
    return getattr(config, SECTION[name])


def _keep(file: Path, name: str, settings: dict[str, Any]) -> None:
    """Adds one model's winner to the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tuned = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write_json(file, tuned | {name: settings})


def _text(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in settings.items()
    )


def _rows(search: Search) -> list[list[str]]:
    return [
        [TITLES[search.name], _text(settings), f"**{value:.4f}**" if settings is search.best else f"{value:.4f}"]
        for settings, value in search.tried
    ]
