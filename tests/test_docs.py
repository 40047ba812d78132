"""Every snippet of the documentation runs, in the order of its page; the site builds without a warning."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch
import typer
from typer.testing import CliRunner

from mmkd.cli import app
from mmkd.config import known_keys

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(python|bash|sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# A page whose snippets need more than this file gives them names the test that runs them: <!-- snippets: tests/test_x.py -->
ELSEWHERE = re.compile(r"<!-- snippets: (tests/\S+\.py) -->")
PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if FENCE.search(p.read_text(encoding="utf-8"))]
SHORT = ("dim=8", "progress=false", "baselines=[popularity]", "teacher.epochs=1", "student.epochs=1")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_command(line: str) -> None:
    """One line of a shell snippet. `mmkd` runs, with training cut short; a make target or a script has to be there; what
    installs or looks at the result is not run."""
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(line, comments=True)]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    if words[:1] == ["make"]:
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
    elif words[:1] == ["python"]:
        scripts = [word for word in words[1:] if word.endswith(".py")]
        assert scripts or words[1] == "-m", line
        assert all((ROOT / script).exists() for script in scripts), line
    elif words[:1] == ["mmkd"]:
        if words[1] == "train" and "--show-settings" not in words and "--resume" not in words:
            given = {word.split("=")[0] for word in words if "=" in word}
            words += [word for s in SHORT if s.split("=")[0] not in given for word in ("--set", s)]
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    else:
        assert words[:2] in (["pip", "install"], []) or words[:1] in (["cd"], ["tensorboard"]), (
            f"{line!r} is not run here: name the test that runs it (see ELSEWHERE)"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    if named := ELSEWHERE.search(text):
        assert page.name in (ROOT / named[1]).read_text(encoding="utf-8"), f"{named[1]} does not run {page.name}"
        return
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_folder").mkdir()
    namespace: dict = {"__name__": "snippet"}
    for kind, code in FENCE.findall(text):
        if kind == "python":
            exec(compile(code, page.name, "exec"), namespace)
        else:
            for line in code.replace("\\\n", " ").splitlines():
                run_command(line)


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stdout + done.stderr
    settings = (tmp_path / "site" / "reference" / "configuration" / "index.html").read_text(encoding="utf-8")
    sections = {key.split(".")[0] for key in known_keys() if "." in key}
    assert all(key in settings for key in known_keys() if key not in sections)
    rows = re.findall(r"<tr>(.*?)</tr>", settings, re.DOTALL)
    assert all(len(re.findall(r"<t[dh]", row)) == 4 for row in rows)
    assert "weight of KL(b^T || b^S)" in settings
    api = (tmp_path / "site" / "reference" / "ops" / "index.html").read_text(encoding="utf-8")
    assert 'id="mmkd.ops.emb_kd_loss"' in api


TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# in indented lines and in backticks; at least one argument
INLINE = re.compile(r"(?:^    (?:.*\bdo )?|`)mmkd (\w+ [^`;#\n|&>]*)", re.MULTILINE)


def test_commands_in_the_text_parse():
    """Those outside of fences are not run, but name a command, options and arguments that exist."""
    group, seen = typer.main.get_command(app), 0
    for page in TEXTS:
        for match in INLINE.finditer(page.read_text(encoding="utf-8")):
            words = shlex.split(re.sub(r"\$\w+|\bN\b", "0", match[1].replace("[", "").replace("]", "")))
            command = group.get_command(click.Context(group), words[0])
            if any(word.isupper() for word in words):  # a placeholder
                continue
            assert command is not None, f"{page.name}: mmkd {match[1]}"
            while isinstance(command, click.Group):
                command, words = command.get_command(click.Context(command), words[1]), words[1:]
            try:
                command.make_context(words[0], words[1:])
            except click.exceptions.ClickException as error:
                pytest.fail(f"{page.name}: mmkd {match[1]}: {error.format_message()}")
            seen += 1
    assert seen > 10
