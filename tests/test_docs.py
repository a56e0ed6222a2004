"""Pages and documents hold together: links lead to headings, every equation of the paper has its
place, and the answers to the exercises run and are right."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
PAGES = [*NOTEBOOKS, *sorted(DOCS.glob("*.md")), ROOT / "README.md"]
COURSE = [path for path in NOTEBOOKS if path.stem[:2].isdigit() and int(path.stem[:2]) <= 12]
EQUATIONS = range(1, 27)  # of the paper
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def cells(path):
    "Pairs of the type and the source of a notebook's cells."
    page = json.loads(path.read_text(encoding="utf-8"))
    return [(cell["cell_type"], "".join(cell["source"])) for cell in page["cells"]]


def text(path):
    "What a page says, without code cells."
    if path.suffix == ".ipynb":
        return "\n".join(source for kind, source in cells(path) if kind == "markdown")
    return path.read_text(encoding="utf-8")


def headings(path):
    "The headings of a page, without their marks; lines of code blocks don't count."
    prose = re.sub(r"^```.*?^```", "", text(path), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^#+ (.*?)\s*$", prose, re.MULTILINE)


def markdown_anchor(heading):
    "The anchor that GitHub gives a heading of a .md file."
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def notebook_anchor(heading):
    "The anchor that Jupyter, nbviewer and GitHub give a heading of a notebook."
    return heading.replace(" ", "-")


def code_by_section(path):
    "Anchor of a heading -> the code of its section, subsections included."
    code, above = {}, []  # above: pairs of level and anchor of the headings that are open
    for kind, source in cells(path):
        if kind == "code":
            for _, anchor in above:
                code[anchor] += source + "\n"
            continue
        for marks, heading in re.findall(r"^(#+) (.*?)\s*$", source, re.MULTILINE):
            level, anchor = len(marks), notebook_anchor(heading)
            above = [pair for pair in above if pair[0] < level] + [(level, anchor)]
            code.setdefault(anchor, "")
    return code


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
def test_links_lead_to_files_and_headings(path):
    for target, anchor in links(path):
        assert target.exists(), f"{path.name} links to {target}, which is not there"
        if anchor:
            of_heading = markdown_anchor if target.suffix == ".md" else notebook_anchor
            anchors = {of_heading(heading) for heading in headings(target)}
            assert anchor in anchors, f"{path.name} links to {target.name}#{anchor}"


def test_the_glossary_is_in_order_and_each_entry_has_an_example_and_a_home():
    entries = glossary_terms()
    names = [name.lower().replace(".", "") for name in entries]
    assert names == sorted(names)
    for name, entry in entries.items():
        assert "*Example:*" in entry, name
        assert re.search(r"→ \[\w+\]\(\.\./nbs/\w+\.ipynb\)", entry), name


def equation_rows():
    "The cells of the table of equations, row by row."
    lines = (DOCS / "equations.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "$" in line]
    return {int(row[0]): row[1:] for row in rows}


def test_every_equation_of_the_paper_has_a_place_a_function_and_a_check():
    "The section of the check has an assertion."
    assert list(equation_rows()) == list(EQUATIONS)
    for number, (equation, says, where, functions, check) in equation_rows().items():
        assert equation.startswith("$") and equation.endswith("$") and says.endswith(".")
        assert LINK.search(where)
        for name in re.findall(r"`([\w.]+)`", functions):
            module, *attributes = name.split(".")
            value = importlib.import_module(f"symmbfn.{module}")
            for attribute in attributes:
                value = getattr(value, attribute)
        place, anchor = LINK.search(check).groups()
        assert "assert" in code_by_section(DOCS / place)[anchor], f"equation {number}: {check}"


def test_every_equation_is_mentioned_in_its_notebook():
    for number, row in equation_rows().items():
        place, _ = LINK.search(row[2]).groups()
        said = re.sub(r"\s+", " ", text(DOCS / place))
        mentions = re.findall(r"[Ee]quations? ((?:\d+(?:, | and | to )?)+)|tag\{([\d, ]+)\}", said)
        numbers = {int(n) for words in mentions for n in re.findall(r"\d+", " ".join(words))}
        assert number in numbers, f"{place} doesn't mention equation {number}"


def answers(path):
    "The Python blocks in the folded answers of a notebook, in order."
    folded = re.findall(r"<details>.*?</details>", text(path), re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```", "\n".join(folded), re.DOTALL | re.MULTILINE)


RUN_EACH = """
import json, sys
for code in json.load(sys.stdin):
    exec(compile(code, "<answer>", "exec"), {"__name__": "__main__"})
"""


@pytest.mark.parametrize("path", COURSE, ids=lambda path: path.stem)
def test_answers_to_the_exercises_run_by_themselves_and_are_right(path, tmp_path):
    "Three or more, each in a namespace of its own, with an assertion that checks the answer."
    blocks = answers(path)
    assert len(blocks) >= 3 and all("assert" in block for block in blocks)
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH],
        input=json.dumps(blocks),
        cwd=tmp_path,
        env=os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), MPLBACKEND="agg"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_minimal_model_fits_on_a_page():
    "At most 200 lines of code that aren't blank, and nothing of the package's own model."
    code = [source for kind, source in cells(ROOT / "nbs" / "33_minimal.ipynb") if kind == "code"]
    lines = [line for line in "\n".join(code).splitlines() if line.strip()]
    assert len(lines) <= 200
    before_checks = "\n".join(code).split("from symmbfn import continuous")[0]
    assert not re.search(r"symmbfn[. ]+(import )?(net|model|train|sample)\b", before_checks)
