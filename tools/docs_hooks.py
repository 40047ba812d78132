"""What `mkdocs build` cannot know by itself: which pages there are, every setting, and where links out of docs/ lead."""

from __future__ import annotations

import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from mkdocs.structure.files import File
from pydantic import BaseModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# (heading, pages in order); a page that is not there is left out, one that is named nowhere goes to the last heading.
SECTIONS = (
    ("Start here", ("index.md",)),
    ("You want a recommender", ("recommender.md", "formats.md", "training.md", "serving.md", "incremental.md")),
    ("You do research", ("research.md", "results.md")),
    (
        "You have a training loop",
        ("own-loop.md", "kernels.md", "gpu.md", "performance.md", "training.md", "scaling.md"),
    ),
    ("Operation", ("interruptions.md", "logging.md")),
    ("Reference", ("reference/configuration.md", "reference/commands.md", "reference/api.md", "reference/ops.md")),
    ("More", ("contributing.md", "changelog.md")),
)
FROM_ROOT = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config):
    """The nav, from the pages that are there."""
    docs = Path(config["docs_dir"])
    there = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} | set(_generated())
    named = {page for _, pages in SECTIONS for page in pages}
    nav = []
    for heading, pages in SECTIONS:
        found = [page for page in pages if page in there]
        if heading == "More":
            found = sorted(there - named) + found
        if found:
            nav.append(found[0] if pages == ("index.md",) else {heading: found})
    config["nav"] = nav
    return config


def on_files(files, config):
    """Adds the generated pages."""
    for name, make in _generated().items():
        files.append(File.generated(config, name, content=make()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to files of the repository that are no pages become the page they are on the site, or their name."""
    here = posixpath.dirname(page.file.src_uri)
    known = {file.src_uri for file in files}
    own = {source: name for name, source in FROM_ROOT.items()}

    def target(match: re.Match) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        base = "" if page.file.src_uri in FROM_ROOT else posixpath.join("docs", here)
        path = posixpath.normpath(posixpath.join(base, link))  # in the repository
        page_name = own.get(path) or path.removeprefix("docs/")
        if page_name in known and (path.startswith("docs/") or path in own):
            return f"[{text}]({posixpath.relpath(page_name, here or '.')}{anchor})"
        return f"{text} (`{path}`)" if path not in text else text

    pieces = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(piece if piece.startswith("```") else _LINK.sub(target, piece) for piece in pieces)


def _generated():
    pages = {
        name: (lambda source=source: (ROOT / source).read_text(encoding="utf-8")) for name, source in FROM_ROOT.items()
    }
    return {**pages, "reference/configuration.md": configuration, "reference/commands.md": commands}


def configuration() -> str:
    """Every setting as a table, from the pydantic models."""
    from mmkd.config import Config

    lines = [
        "# Every setting",
        "",
        "Given in a YAML file (`mmkd train --config FILE`), one by one (`--set teacher.lr=1e-3`), or as a mapping to "
        "`mmkd.train`. `mmkd train --show-settings` prints them all; an unknown one is refused, with the nearest known one.",
    ]
    for path, model in _models(Config):
        doc = " ".join((model.__doc__ or "").split())
        lines += [
            "",
            f"## {path or 'Top level'}",
            "",
            doc,
            "",
            "| setting | type | default | meaning |",
            "| --- | --- | --- | --- |",
        ]
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                lines.append(f"| [`{name}`](#{(path + name).replace('.', '')}) | section | | {_cell(field)} |")
                continue
            kind = _type(field)
            full = f"{path}.{name}" if path else name
            default = field.get_default(call_default_factory=True)
            lines.append(f"| `{full}` | {kind} | `{default!r}` | {_cell(field)} |")
    return "\n".join(lines) + "\n"


def _models(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _models(field.annotation, f"{path}.{name}" if path else name)


def _cell(field) -> str:
    return (field.description or "").replace("|", "\\|")


def _type(field) -> str:
    name = field.annotation.__name__ if isinstance(field.annotation, type) else str(field.annotation)
    name = name.replace("typing.", "").replace(" | None", " or None")
    limits = [str(rule) for rule in field.metadata if type(rule).__name__ in ("Ge", "Gt", "Le", "Lt")]
    signs = {"Ge(ge=": "≥ ", "Gt(gt=": "> ", "Le(le=": "≤ ", "Lt(lt=": "< "}
    for long, short in signs.items():
        limits = [limit.replace(long, short).rstrip(")") for limit in limits]
    return f"`{name}`" + (", " + ", ".join(limits) if limits else "")


def commands() -> str:
    """`--help` of every command, as it is on the terminal."""
    os.environ.update(COLUMNS="110", NO_COLOR="1", TERM="dumb", TERMINAL_WIDTH="110")
    from typer.main import get_command
    from typer.testing import CliRunner

    from mmkd.cli import app

    lines = [
        "# Every command",
        "",
        "`mmkd --install-completion` makes the shell complete commands, options and settings.",
        "",
    ]
    for name in get_command(app).commands:
        text = CliRunner().invoke(app, [name, "--help"], prog_name="mmkd").output
        lines += [f"## mmkd {name}", "", "```text", *(line.rstrip() for line in text.strip().splitlines()), "```", ""]
    return "\n".join(lines)
