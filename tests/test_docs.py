"""Every snippet of the README and the pages runs, in order, as a reader would run it."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "README.zh.md", *sorted(ROOT.glob("docs/*.md"))]
SNIPPET = re.compile(r"^```python(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!http)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.parametrize("where", ["anywhere", "on a GPU"])
def test_snippets(page, where, fresh_compiler):
    snippets = SNIPPET.findall(page.read_text())
    if where == "on a GPU":
        if not any("needs a GPU" in info for info, _ in snippets):
            return  # all of them run anywhere
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
    if any("transformers" in code for _, code in snippets):
        pytest.importorskip("transformers", reason="transformers is not installed")
    names: dict[str, object] = {"__name__": "snippet"}
    for number, (info, code) in enumerate(snippets):
        if where == "anywhere" and "needs a GPU" in info:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
            program = compile(code, f"{page.name}, snippet {number}", "exec")
            exec(program, names)  # noqa: S102 (the reader would)


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
