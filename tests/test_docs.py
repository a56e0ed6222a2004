"Links to the glossary lead somewhere."

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted((ROOT / "nbs").glob("*.ipynb")), *sorted(DOCS.glob("*.md")), ROOT / "README.md"]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def cells(path, kind="markdown"):
    "The sources of a notebook's cells of one kind."
    page = json.loads(path.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in page["cells"] if cell["cell_type"] == kind]


def text(path):
    "What a page says, without code cells."
    if path.suffix == ".ipynb":
        return "\n".join(cells(path))
    return path.read_text(encoding="utf-8")


def headings(path):
    "The headings of a page, without their marks; lines of code blocks don't count."
    prose = re.sub(r"^```.*?^```", "", text(path), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ (.*?)\s*$", prose, re.MULTILINE)


def markdown_anchor(heading):
    "The anchor that GitHub gives a heading of a .md file."
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def glossary_terms():
    "Heading -> its entry."
    title, *entries = (DOCS / "glossary.md").read_text(encoding="utf-8").split("\n## ")
    return dict(entry.split("\n", 1) for entry in entries)


def links(path):
    "Pairs of the file that a link leads to and the anchor in it; the web is left out."
    found = []
    for place, anchor in LINK.findall(text(path)):
        if not re.match(r"[a-z]+:", place):
            found.append(((path.parent / place).resolve() if place else path, anchor))
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_to_headings_of_the_docs(path):
    for target, anchor in links(path):
        assert target.exists(), f"{path.name} links to {target}, which is not there"
        if target.suffix == ".md" and anchor:
            anchors = {markdown_anchor(heading) for heading in headings(target)}
            assert anchor in anchors, f"{path.name} links to {target.name}#{anchor}"


def test_the_glossary_is_in_order_and_each_entry_has_an_example_and_a_home():
    entries = glossary_terms()
    names = [name.lower().replace(".", "") for name in entries]
    assert names == sorted(names)
    for name, entry in entries.items():
        assert "*Example:*" in entry, name
        assert re.search(r"→ \[\w+\]\(\.\./nbs/\w+\.ipynb\)", entry), name
