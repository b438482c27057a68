"""The pages: every link leads somewhere, every command parses, and the README stays short."""

import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from experiments.cli import parse_config
from rpt_jax.config.schema import MOVES, walk
from rpt_jax.config.sections import Config

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
# Scripts whose whole command line is a preset and settings: --dry-run prints the resolved run.
CONFIGURED = ("experiments.train", "experiments.filter_positions", "experiments.quickstart")


def anchors(page: Path) -> set[str]:
    """GitHub's names of the page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def commands(page: Path) -> list[list[str]]:
    """The arguments of each `python -m experiments...`, lines that end with a backslash joined."""
    text = page.read_text().replace("\\\n", " ")
    found = re.findall(r"python -m (experiments[\w.]*[^`\n\"]*)", text)
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_readme_lists_every_page_and_stays_short():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 200
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if f"(docs/{p.name})" not in readme]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_parses(page, capsys):
    for module, *arguments in commands(page):
        assert importlib.util.find_spec(module), module
        if module in CONFIGURED and "..." not in arguments and "--help" not in arguments:
            arguments = [a for a in arguments if a != "--dry-run"]
            importlib.import_module(module).main([*arguments, "--dry-run"])
            assert '"format"' in capsys.readouterr().out


def test_the_flags_of_each_paper_parse():
    flags = re.findall(r"`(--[^`]+)`", (ROOT / "docs/papers.md").read_text())
    assert len(flags) > 20
    for text in flags:
        words = shlex.split(text)
        config, _ = parse_config(words if "--preset" in words else ["--preset", "text", *words])
        assert config


def test_every_named_trial_exists():
    """Tests that the reliability page names, as `name` or `file.py: name`."""
    page = (ROOT / "docs/reliability.md").read_text()
    table = page[page.index("## Trials") : page.index("## What is not promised")]
    for file, name in re.findall(r"`(?:(test_\w+\.py): )?([a-z]\w+)`", table):
        source = (ROOT / "tests" / (file or "test_trials.py")).read_text()
        assert f"def test_{name}" in source, name


def test_every_named_setting_exists():
    """Settings that the pages name in code, as section.field or --section.field."""
    fields = {path for path, _, _ in walk(Config())}
    sections = {path.split(".")[0] for path in fields}
    for page in PAGES:
        text = page.read_text() if page.name != "CHANGELOG.md" else ""
        for name in re.findall(r"(?:`|--)(\w+\.[\w\-]+)(?=[`\s])", text):
            section, _, field = name.partition(".")
            if section not in sections or field in ("py", "md", "json", "html"):
                continue
            path = f"{section}.{field.removeprefix('no-').replace('-', '_')}"
            assert path in fields, f"{page.name}: {name}"
            assert path not in {move.old for move in MOVES}
