"Test the command line: help, options, exit codes, and what each command writes."

import inspect
import os
import subprocess
import sys
from dataclasses import fields

import click
import pytest
from click.testing import CliRunner

import symmbfn
from symmbfn.__main__ import main
from symmbfn.data import load_dataset, load_mp20, save_dataset
from symmbfn.reconstruct import snap_to_wyckoff
from symmbfn.wyckoff import wyckoff_labels

COMMANDS = sorted(main.commands)
TINY = "--set hidden=16 --set embed=8 --set layers=1 --set freqs=2 --epochs 2 --batch-size 20"
# packages that a machine may lack if it only trains
HEAVY = "pymatgen gemmi moyopy spglib smact matminer chgnet ase pandas pyarrow joblib scipy"
HEAVY += " matplotlib tqdm"


def run(*words):
    "Run a command in this process. Returns click's Result: exit_code, output, stderr."
    return CliRunner().invoke(main, [str(word) for word in words])


def options_of(command):
    "Options of a command: name of the parameter -> click's Option."
    parameters = main.commands[command].params
    return {p.name: p for p in parameters if isinstance(p, click.Option) and p.name != "help"}


@pytest.fixture(scope="module")
def data_sets(tmp_path_factory):
    "A folder with train.safetensors, 60 crystals of MP-20, and val.safetensors, 30 crystals."
    folder = tmp_path_factory.mktemp("data")
    splits = load_mp20()
    save_dataset(folder / "train.safetensors", splits["train"][:60])
    save_dataset(folder / "val.safetensors", splits["val"][:30])
    return folder


@pytest.fixture(scope="module")
def trained(data_sets):
    "The folder of a training run of two epochs, whose model knows the property band_gap."
    run_dir = data_sets / "run"
    words = f"train {data_sets}/train.safetensors --val {data_sets}/val.safetensors {TINY}".split()
    done = run(*words, "--run-dir", run_dir, "--properties", "band_gap")
    assert done.exit_code == 0, done.output
    return run_dir


def test_commands():
    assert COMMANDS == [
        "encode",
        "evaluate",
        "export",
        "finetune",
        "generate",
        "info",
        "predict",
        "relax",
        "runs",
        "screen",
        "train",
        "vary",
    ]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], *([c, "--help"] for c in COMMANDS)])
def test_help_has_examples(words):
    done = run(*words)
    assert done.exit_code == 0
    assert "Examples:" in done.output


def test_help_and_version_load_nothing_heavy():
    code = "import sys, runpy; sys.argv = ['symmbfn', '--version']\n"
    code += "try: runpy.run_module('symmbfn', run_name='__main__')\n"
    code += "except SystemExit: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    version, modules = done.stdout.splitlines()
    assert version == f"symmbfn {symmbfn.__version__}"
    assert not {"torch", "numpy", *HEAVY.split()} & {m.split(".")[0] for m in modules.split()}


def test_generate_has_the_options_of_the_function():
    from symmbfn.generation import generate, parse_request

    function = inspect.signature(generate).parameters
    request = inspect.signature(parse_request).parameters
    names = {*function, *request} - {"request"}  # request stands for the others
    command_only = {"relax"}  # in Python: relax(generate(...))
    assert set(options_of("generate")) == names | command_only
    for name in ("steps", "method", "temperature", "seed", "precision", "batch_size", "device"):
        assert options_of("generate")[name].default == function[name].default, name


def test_screen_and_relax_have_the_options_of_the_functions():
    from symmbfn.generation import generate, parse_request
    from symmbfn.screening import relax, screen

    functions = [dict(inspect.signature(f).parameters) for f in (screen, generate, parse_request)]
    names = {name for function in functions for name in function}
    assert set(options_of("screen")) == names - {"generation", "request"}
    assert set(options_of("relax")) == {*inspect.signature(relax).parameters} - {"structures"}
    for command, function in (
        ("screen", functions[0]),
        ("relax", inspect.signature(relax).parameters),
    ):
        for name in ("fmax", "max_steps", "symmetry", "potential", "device"):
            assert options_of(command)[name].default == function[name].default, (command, name)
    for name in ("max_energy", "max_minutes", "block_size", "seed"):
        assert options_of("screen")[name].default == functions[0][name].default, name


def test_predict_has_the_options_of_the_function():
    from symmbfn.prediction import predict

    function = inspect.signature(predict).parameters
    options = options_of("predict")
    assert set(options) == set(function)
    for name in ("n", "rank", "potential", "steps", "seed", "device"):
        assert options[name].default == function[name].default, name


def test_vary_has_the_options_of_the_function():
    from symmbfn.screening import SAMPLER
    from symmbfn.variation import vary

    function = inspect.signature(vary).parameters
    options = options_of("vary")
    assert set(options) == {*function, *SAMPLER} - {"structures", "sampling"}
    assert options["keep"].default == list(function["keep"].default)
    for name in ("forget", "seed", "device", "batch_size"):
        assert options[name].default == function[name].default, name


def test_finetune_has_the_options_of_the_function():
    from symmbfn.finetuning import finetune

    function = inspect.signature(finetune).parameters
    options = options_of("finetune")
    assert set(options) == set(function) - {"source"}
    for name in set(options) - {"out", "model", "val", "properties", "workers"}:
        assert options[name].default == function[name].default, name


def test_train_has_the_options_of_the_configuration():
    from symmbfn.train import TrainConfig

    options = options_of("train")
    for field in fields(TrainConfig):
        assert options[field.name].default == field.default, field.name


def test_evaluate_and_encode_have_the_options_of_the_functions():
    from symmbfn.evaluation import evaluate

    python_only = {"structures", "cache"}
    command_only = {"scale"}  # in Python: evaluate(..., hull=on_scale(hull, scale))
    options = set(options_of("evaluate")) - command_only
    assert options <= {*inspect.signature(evaluate).parameters} - python_only


def test_an_option_means_the_same_everywhere():
    for name in ("out", "seed", "device", "workers", "model"):
        found = [options_of(c)[name] for c in COMMANDS if name in options_of(c)]
        assert len({type(option.type) for option in found}) == 1, name
        assert {tuple(option.opts) for option in found} == {(f"--{name}",)}


@pytest.mark.parametrize(
    "words, said",
    [
        ("invent", "No such command"),
        ("generate", "Missing option"),
        ("generate --n many --out x", "not a valid integer"),
        ("generate --n 0 --out x", "n is 0"),
        ("generate --n 1 --elements Xx --out x", "'Xx' is unknown"),
        ("generate --n 1 --composition Li0.5O --out x", "whole positive"),
        ("generate --n 1 --condition gap --out x", "not of the form NAME=VALUE"),
        ("generate --n 1 --condition gap=1 --out x", "knows no property"),
        ("generate --n 1 --site Ti --out x", "not of the form ELEMENT:POSITION"),
        ("generate --n 1 --site Ti:2a:0,y,0 --out x", "not of the form X,Y,Z"),
        ("generate --n 1 --site Ti::0,0 --out x", "give three"),
        ("generate --n 1 --site Ti:2a --out x", "single space group"),
        ("generate --n 1 --method euler --out x", "not one of"),
        ("generate --n 1 --temperature -1 --out x", "temperature"),
        ("generate --n 1 --batch-size few --out x", "neither a whole number"),
        ("generate --n 1 --device abacus --out x", "device is 'abacus'"),
        ("generate --n 1 --seed -1 --out x", "not in the range"),
        ("generate --n 1 --elements , --out x", "elements is empty"),
        ("generate --n 1 --space-group 221-231 --out x", "'221-231' is unknown"),
        ("generate --n 1 --condition x=-2eV --out x", "x is '-2eV': give a number"),
        ("generate --n 1 --condition x=true --out x", "x is True: give a number"),
        ("generate --n 1 --condition x=NaN --out x", "x is nan: give a number"),
        ("generate --n 1 --condition x=1 --condition x=2 --out x", "two targets"),
        ("generate --n 1 --out=", "It is empty"),
        ("evaluate some --workers -1 --out x", "not in the range"),
        ("evaluate some --relaxations -1 --out x", "not in the range"),
        ("generate --n 1 --model none.safetensors --out x", "does not exist"),
        ("evaluate nowhere --out x", "nowhere"),
        ("relax nowhere --out x", "nowhere"),
        ("relax some --symmetry broken --out x", "not one of"),
        ("screen --n 0 --out x", "n is 0"),
        ("screen --n 1 --max-minutes 0 --out x", "max_minutes is 0"),
        ("screen --n 1 --potential EMT --out x", "'EMT' is unknown"),
        ("screen --n 1 --scale paper --potential ase.calculators.emt:EMT --out x", "no scale"),
        ("predict --out x", "Missing option"),
        ("predict --composition Ca10P6O26H2 --out x", "44 atoms or more"),
        ("predict --composition SrTiO3 --formula-units 5 --out x", "cells of at most 20"),
        ("predict --composition NaCl --n 0 --out x", "n is 0"),
        ("predict --composition NaCl --rank beauty --out x", "not one of"),
        ("predict --composition NaCl --potential EMT --out x", "'EMT' is unknown"),
        ("finetune nowhere --out x", "nowhere"),
        ("finetune mp20", "Missing option"),
        ("finetune mp20 --properties colour --out x", "Unknown property colour"),
        ("finetune mp20 --properties , --out x", "properties is empty"),
        ("finetune mp20 --lr 0 --out x", "lr is 0"),
        ("finetune mp20 --patience 0 --out x", "patience is 0"),
        ("finetune mp20 --epochs 0 --out x", "give max_minutes too"),
        ("finetune mp20 --model none.safetensors --out x", "does not exist"),
        ("encode nowhere --out x.safetensors", "nowhere"),
        ("encode nowhere --out x", "ends in .safetensors"),
        ("train mp20", "Missing option"),
        ("train mp20 --run-dir x --set colour=red", "no setting 'colour'"),
        ("train mp20 --run-dir x --set hidden=big", "type int"),
        ("train mp20 --run-dir x --properties colour", "colour"),
        ("train mp20 --run-dir x --lr 0", "lr is 0"),
        ("train mp20 --run-dir x --eval-n -1", "not in the range"),
        ("train nowhere.csv --run-dir x --device abacus", "device is 'abacus'"),
        ("train nowhere.csv --run-dir x --epochs -1", "epochs is -1"),
        ("train some.safetensors --run-dir x", "--val FILE"),
        ("train some.safetensors --val other.safetensors --run-dir x", "some.safetensors"),
    ],
)
def test_what_is_refused_ends_with_2_and_writes_nothing(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*words.split())
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_what_fails_ends_with_1(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise RuntimeError("The machine\nis on fire.")

    monkeypatch.setattr("symmbfn.generation.generate", fail)
    done = run("generate", "--n", 1, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr == "Error: The machine is on fire.\n"


def test_generate_writes_files_and_goes_on(tmp_path):
    out = tmp_path / "out"
    words = ["generate", "--n", 3, "--space-group", "Fm-3m,62", "--elements", "Li,O", "--steps", 5]
    done = run(*words, "--out", out, "--no-progress")
    assert done.exit_code == 0, done.output
    assert "3 crystals are in" in done.output
    assert len(list(out.glob("*.cif"))) == len(list(out.glob("*.vasp"))) == 3
    assert set(load_dataset(out / "crystals.safetensors")[0].crystals.G.tolist()) <= {225, 62}
    assert run(*words, "--out", out).exit_code == 0
    other = run(*words, "--out", out, "--seed", 9)
    assert other.exit_code == 2
    assert "another folder" in other.stderr


def test_generate_puts_given_sites_where_they_are_asked_for(tmp_path):
    words = """
        generate --n 3 --steps 2 --space-group 136 --composition TiO2 --no-progress
        --site Ti:2a:0,0,0 --site :b
    """
    done = run(*words.split(), "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    crystals = load_dataset(tmp_path / "out" / "crystals.safetensors")[0].crystals
    positions = wyckoff_labels(snap_to_wyckoff(crystals)[1])
    for i in range(3):
        first, second = (crystals.b == i).nonzero()[:2, 0]
        assert (crystals.a[first], positions[first], positions[second]) == (22, "2a", "2b")
        assert crystals.x[first].tolist() == [0, 0, 0]


def test_a_trained_model_generates_what_it_is_asked_for(trained, tmp_path):
    words = f"""
        generate --n 2 --steps 2 --space-group 225 --lattice 6 6 6 90 90 90
        --condition band_gap=1 --guidance 1 --model {trained}/model.safetensors
    """
    done = run(*words.split(), "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "asked_band_gap" in (tmp_path / "out" / "samples.csv").read_text().splitlines()[0]


def test_stable_crystals_are_asked_for_unless_told_otherwise(tmp_path):
    for name, words in (("stable", ""), ("any", "--condition none"), ("best", "--best 0.5")):
        done = run(
            *f"generate --n 1 --steps 2 --no-progress {words} --out".split(), tmp_path / name
        )
        assert done.exit_code == 0, done.output
        header, *rows = (tmp_path / name / "samples.csv").read_text().splitlines()
        assert ("asked_e_above_hull" in header) == (name != "any")
        assert len(rows) == 1
    words = "generate --n 1 --condition none --condition x=1 --out"
    refused = run(*words.split(), tmp_path / "x")
    assert refused.exit_code == 2
    assert "none stands beside another target" in refused.stderr


def test_train_goes_on_or_refuses(trained, data_sets):
    words = f"train {data_sets}/train.safetensors --val {data_sets}/val.safetensors {TINY}".split()
    words += ["--run-dir", trained]
    assert run(*words, "--properties", "band_gap").exit_code == 0
    other = run(*words, "--properties", "band_gap", "--lr", 0.1)
    assert other.exit_code == 2
    assert "lr" in other.stderr


def test_training_needs_torch_numpy_safetensors_and_click_alone(data_sets):
    "None in sys.modules makes an import fail, as on a machine that lacks the package."
    code = f"import sys; sys.modules |= dict.fromkeys('{HEAVY}'.split())\n"
    code += "from symmbfn.__main__ import main; main()"
    words = f"train {data_sets}/train.safetensors --val {data_sets}/val.safetensors {TINY}".split()
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--run-dir", data_sets / "lean"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (data_sets / "lean" / "model.safetensors").exists()


def test_torchrun_passes_every_option_on(data_sets):
    """torchrun has options that begin with --run, --n and other letters of our options.

    It accepts abbreviations, so that it could take one of our options for one of its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = f"train {data_sets}/train.safetensors --val {data_sets}/val.safetensors {TINY}".split()
    words += f"--run-dir {data_sets}/two --lr 0.002 --seed 3 --validate-every 1".split()
    done = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", "-m", "symmbfn", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The model is") == 1
    assert (data_sets / "two" / "model.safetensors").exists()


def test_torchrun_takes_none_of_our_options_for_its_own():
    from torch.distributed.run import get_args_parser

    for name, option in options_of("train").items():
        words = [option.opts[0], "1"]
        parsed = get_args_parser().parse_args(["-m", "symmbfn", "train", *words])
        assert parsed.training_script_args == ["train", *words], name


def test_evaluate_writes_a_report(tmp_path):
    save_dataset(tmp_path / "some.safetensors", load_mp20()["val"][:4])
    out = tmp_path / "report"
    done = run("evaluate", tmp_path / "some.safetensors", "--relaxations", 0, "--out", out)
    assert done.exit_code == 0, done.output
    assert len((out / "structures.csv").read_text().splitlines()) == 5
    assert "valid" in (out / "summary.txt").read_text()


def test_encode_makes_a_data_set(tmp_path):
    made = run("generate", "--n", 3, "--steps", 5, "--composition", "NaCl", "--out", tmp_path / "a")
    assert made.exit_code == 0, made.output
    for i, path in enumerate((tmp_path / "a", tmp_path / "a" / "crystals.extxyz")):
        out = tmp_path / f"{i}.safetensors"
        done = run("encode", path, "--out", out, "--workers", 1)
        assert done.exit_code == 0, done.output
        assert "3 crystals" in done.output
        assert len(load_dataset(out)[0]) == 3


def test_info_says_what_is_there():
    done = run("info")
    assert done.exit_code == 0, done.output
    for words in (symmbfn.__version__, "weights.safetensors", "mp20.safetensors", "cpu:", "'auto'"):
        assert words in done.output


def test_info_describes_a_model(trained):
    done = run("info", "--model", trained / "model.safetensors")
    assert "band_gap" in done.output
    assert "60 crystals for 2 epochs" in done.output


def test_runs_are_compared(tmp_path):
    data = load_mp20()
    save_dataset(tmp_path / "train.safetensors", data["train"][:20])
    save_dataset(tmp_path / "val.safetensors", data["val"][:4])
    small = [word for name in ("hidden=16", "embed=8", "layers=1") for word in ("--set", name)]
    for seed in (0, 1):
        done = run(
            *("train", tmp_path / "train.safetensors", "--val", tmp_path / "val.safetensors"),
            *("--run-dir", tmp_path / f"seed{seed}", "--seed", seed, "--epochs", 2, *small),
        )
        assert done.exit_code == 0, done.output
    done = run("runs", tmp_path, "--plot", tmp_path / "losses.png")
    assert done.exit_code == 0, done.output
    header, first, second, *_ = done.output.splitlines()
    assert header.split() == ["run", "epochs", "minutes", "train_loss", "val_loss", "seed"]
    assert {first.split()[0], second.split()[0]} == {"seed0", "seed1"}
    assert float(first.split()[4]) <= float(second.split()[4])
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    done = run("runs", tmp_path / "none")
    assert done.exit_code == 2
    assert "There is no run in" in done.stderr
