"""Every snippet of the README and the pages runs, in order, as a reader would run it."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted(ROOT.glob("docs/*.md"))]
SNIPPET = re.compile(r"^```python(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!http)([^)#]+)")


WITHOUT_SNIPPETS = {"how_fast.md", "support.md"}


def snippets_of(page: Path) -> list[tuple[str, str]]:
    return SNIPPET.findall(page.read_text())


def needs_gpu(info: str) -> bool:
    return "needs a GPU" in info


def run(page: Path, snippets: list[tuple[str, str]]) -> None:
    if any("transformers" in code for _, code in snippets):
        pytest.importorskip("transformers", reason="transformers is not installed")
    names: dict[str, object] = {"__name__": "snippet"}
    for number, (_, code) in enumerate(snippets):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
            program = compile(code, f"{page.name}, snippet {number}", "exec")
            exec(program, names)  # noqa: S102 (the reader would)


def test_pages_have_snippets():
    assert {page.name for page in PAGES if not snippets_of(page)} == WITHOUT_SNIPPETS


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if not all(needs_gpu(info) for info, _ in snippets_of(p))],
    ids=lambda page: page.name,
)
def test_snippets(page, fresh_compiler):
    run(page, [(info, code) for info, code in snippets_of(page) if not needs_gpu(info)])


@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if any(needs_gpu(info) for info, _ in snippets_of(p))],
    ids=lambda page: page.name,
)
def test_snippets_that_need_a_gpu(page, cuda, fresh_compiler):
    run(page, snippets_of(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_page_is_linked_from_both_readmes():
    for readme in PAGES[:2]:
        linked = {(ROOT / target).resolve() for target in LINK.findall(readme.read_text())}
        assert set(PAGES[2:]) <= linked, readme.name


def test_support_is_what_the_code_says(capsys):
    pytest.importorskip("transformers", reason="transformers is not installed")
    specification = importlib.util.spec_from_file_location("support", ROOT / "docs/support.py")
    support = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(support)
    support.main()
    wrong = "run python docs/support.py > docs/support.md"
    assert capsys.readouterr().out == (ROOT / "docs/support.md").read_text(), wrong
