"""The experiments as papermill runs them.

Parameters take effect or are refused, and every page shows the outputs of its own command."""

import ast
import csv
import json
import re
import shlex
from pathlib import Path

import papermill
import pytest

root = Path(__file__).parent.parent
PAGES = sorted(path.stem for path in (root / "nbs").glob("[23]*.ipynb"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    "A function that executes an experiment in an empty folder and returns that folder."
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.chdir(tmp_path)

    def execute(name, **parameters):
        papermill.execute_notebook(
            root / "nbs" / f"{name}.ipynb",
            tmp_path / f"{name}.ipynb",
            parameters=parameters,
            progress_bar=False,
        )
        return tmp_path

    return execute


def read_csv(path):
    "A dict for each row of a CSV file."
    with open(path) as file:
        return list(csv.DictReader(file))


SMALL = dict(
    run_dir="run",
    limit=60,
    val_limit=30,
    epochs=2,
    hidden=16,
    embed=8,
    layers=1,
    freqs=2,
    samples=4,
    steps=3,
    validate_every=1,
    eval_n=6,
    eval_every=2,
)


def test_train_then_sample(run):
    "A training run leaves its files in its folder, and 21_sample takes its model from there."
    folder = run("20_train", **SMALL) / "run"
    log = read_csv(folder / "log.csv")
    assert [row["epoch"] for row in log] == ["1", "2"]
    assert all(float(row["val_loss"]) > 0 for row in log)
    assert log[0]["eval_score"] == "" and 0 < float(log[1]["eval_score"]) <= 1
    assert len(list((folder / "samples").glob("*.cif"))) == 4
    assert len(read_csv(folder / "samples" / "samples.csv")) == 4
    for name in ("losses.png", "gallery.png", "distributions.png"):
        assert (folder / name).stat().st_size > 1000
    for name in ("model", "best", "checkpoint"):
        assert (folder / f"{name}.safetensors").stat().st_size > 1000

    sampled = dict(run_dir="run", out="sampling", samples=3, sweep=2, steps="2,4")
    rows = read_csv(run("21_sample", **sampled) / "sampling" / "sampling.csv")
    assert {"2", "4"} <= {row["steps"] for row in rows}


WRONG = [  # experiment, parameters, words of the error message
    ("20_train", dict(epoch=3), "Unknown parameter epoch"),
    ("20_train", dict(epochs="many"), "Parameter epochs is 'many', but must be int"),
    ("20_train", dict(batch_size=0), "batch_size is 0: give a whole number from 1"),
    ("20_train", dict(preset="papers"), "Unknown preset"),
    ("20_train", dict(data="mp30"), "mp30"),
    ("20_train", dict(precision="half"), "Unknown precision 'half'"),
    ("21_sample", dict(run_dir="nowhere"), "train a model with 20_train first"),
    ("21_sample", dict(steps="5;10"), "separated by commas"),
    ("22_evaluate", dict(step=5), "Unknown parameter step"),
    ("25_stability", dict(relaxation=10), "Unknown parameter relaxation"),
]


@pytest.mark.parametrize("name, parameters, words", WRONG)
def test_wrong_parameters_are_refused_in_one_sentence(run, name, parameters, words, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=words):
        run(name, **parameters)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "nowhere").exists()


def source(cell):
    "The text of a cell."
    return "".join(cell["source"])


def default_parameters(cells):
    "The values in the parameters cell of a page, by name."
    cell = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
    assignments = [node for node in ast.parse(source(cell)).body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: ast.literal_eval(node.value) for node in assignments}


def parameters_of_command(cells, name):
    "All parameters of the first papermill command on a page: given there, or the default."
    text = "\n".join(source(c) for c in cells if c["cell_type"] == "markdown")
    command = re.search(rf"^papermill nbs/{name}\.ipynb.*?[^\\]$", text, re.M | re.S)
    assert command, "the page doesn't say which command made it"
    words = shlex.split(command[0])
    values = default_parameters(cells)
    for i, word in enumerate(words):
        if word == "-p":
            kind = type(values[words[i + 1]])
            value = words[i + 2]
            values[words[i + 1]] = value == "True" if kind is bool else kind(value)
    return values


def printed_parameters(cells):
    "The parameters in the output of the cell that calls `check_parameters`."
    cell = next(c for c in cells if "p = check_parameters(" in source(c))
    assert cell["outputs"], "the page was not run"
    return ast.literal_eval("".join(cell["outputs"][-1]["data"]["text/plain"]))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_the_outputs_of_its_command(name):
    "The command in the text and the parameters printed below it are the same."
    cells = json.loads((root / "nbs" / f"{name}.ipynb").read_text())["cells"]
    if not any("check_parameters(" in source(c) for c in cells):
        pytest.skip("a page without parameters")
    assert printed_parameters(cells) == parameters_of_command(cells, name)
