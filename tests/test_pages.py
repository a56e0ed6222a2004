"The outputs on every page belong to the source and the parameters beside them."

import nbformat
import pages
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


@pytest.mark.parametrize("path", sorted(pages.NOTEBOOKS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_outputs_belong_to_source(path):
    assert pages.problems(path) == []


@pytest.fixture
def page(tmp_path):
    "A small page in the manner of ours: the path of its notebook, run and recorded."
    path = tmp_path / "98_small.ipynb"
    cells = [
        new_markdown_cell("# Small\n`papermill nbs/98_small.ipynb runs/small.ipynb -p n 3`"),
        new_code_cell("n: int = 2\nword: str = 'a'", metadata=dict(tags=["parameters"])),
        new_code_cell("p = dict(n=n, word=word)\np"),
        new_code_cell("print(n * word)"),
    ]
    kernel = dict(name="python3", display_name="python3", language="python")
    nbformat.write(new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), path)
    pages.run(path)
    return path


def edited(path, old, new):
    "The problems of a page after one replacement in its file."
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    found = pages.problems(path)
    path.write_text(text)
    return found


def test_a_page_is_recorded_and_every_change_is_noticed(page):
    assert pages.problems(page) == []
    notebook = nbformat.read(page, 4)
    assert notebook.cells[-1].outputs[0].text == "aaa\n"
    assert [cell.cell_type for cell in notebook.cells] == ["markdown", "code", "code", "code"]

    (line,) = edited(page, "print(n * word)", "print(word * n)")
    assert "code of 98_small has changed" in line
    (line,) = edited(page, '"aaa\\n"', '"aaaa\\n"')
    assert "other outputs than those recorded" in line
    stated, parameters = edited(page, "-p n 3`", "-p n 4`")
    assert "was made by `papermill nbs/98_small.ipynb runs/small.ipynb -p n 3`" in stated
    assert "shows the parameters {'n': 3, 'word': 'a'}" in parameters
    (line,) = edited(page, '"symmbfn": {', '"other": {')
    assert "has no record" in line
    assert edited(page, "# Small", "# Tiny") == []


def test_layout_comments_and_docstrings_do_not_count(page):
    assert edited(page, "print(n * word)", "print((n)  *  word)  # twice") == []
    (line,) = edited(page, "print(n * word)", "print(n * (word + word))")
    assert "code of 98_small has changed" in line


def test_parameters_of_a_command_have_their_types():
    given = pages.given_parameters("papermill a b -p steps 5,10 -p lr 1e-3 -p n 7")
    assert given == dict(steps="5,10", lr=1e-3, n=7)
