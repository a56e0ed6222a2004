"""The command line: `symmbfn COMMAND`, or `python -m symmbfn COMMAND`.

Exit codes: 0 done; 1 failed while running; 2 wrong usage, or a request that is refused. An error
is one sentence on stderr. Everything heavy is imported inside the commands, so that help comes at
once. The options are the parameters of the Python functions, with dashes for underscores.
"""

import gzip
import json
import os
from pathlib import Path

import click

from symmbfn import __version__


def refused(error):
    "The error as one line, with exit code 2."
    exception = click.ClickException(" ".join(str(error).split()))
    exception.exit_code = 2
    return exception


def failed(error):
    "The error as one line, with exit code 1."
    return click.ClickException(" ".join(str(error).split()) or type(error).__name__)


class Commands(click.Group):
    "Commands whose errors are sentences, without a traceback."

    def invoke(self, context):
        try:
            return super().invoke(context)
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own way to end
        except (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise refused(error) from error
        except (OSError, RuntimeError, ArithmeticError, ImportError, MemoryError) as error:
            raise failed(error) from error


class CommaSeparated(click.ParamType):
    "Names with commas between them, as a list."

    name = "a,b,..."

    def convert(self, value, param, context):
        if isinstance(value, list):
            return value
        return [word.strip() for word in value.split(",") if word.strip()]


class NumberOrAuto(click.ParamType):
    "A whole number, or the word auto."

    name = "integer|auto"

    def convert(self, value, param, context):
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor 'auto'.", param, context)


class Assignment(click.ParamType):
    "NAME=VALUE, as a pair. The value is a number, true, false, or else text."

    name = "name=value"

    def convert(self, value, param, context):
        if isinstance(value, tuple):
            return value
        name, equals, text = value.partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is not of the form NAME=VALUE.", param, context)
        try:
            return name, json.loads(text)
        except json.JSONDecodeError:
            return name, text


def out_option(what, **settings):
    return click.option("--out", type=click.Path(path_type=Path), help=what, **settings)


seed_option = click.option("--seed", type=int, default=0, help="The same seed, the same result.")
workers_option = click.option(
    "--workers", type=int, help="Processes; by default one for each core, 8 at most."
)
model_option = click.option(
    "--model",
    type=click.Path(exists=True, dir_okay=False),
    help="Weights to use, a file of a training run; by default those of the package.",
)


def device_option(default):
    return click.option(
        "--device", default=default, help="cpu, cuda, or auto: a GPU if there is one."
    )


def precision_option(default):
    return click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "auto"]),
        default=default,
        help="Of the network; auto is bfloat16 where the hardware is fast at it.",
    )


@click.group(
    cls=Commands,
    invoke_without_command=True,
    context_settings=dict(
        help_option_names=["-h", "--help"], show_default=True, max_content_width=100
    ),
    epilog="symmbfn COMMAND --help explains a command and gives examples.",
)
@click.version_option(__version__, message="symmbfn %(version)s")
@click.pass_context
def main(context):
    """Generate crystals with the symmetry you ask for, and measure crystals of any origin.

    \b
    Examples:
      symmbfn generate --n 8 --out crystals
      symmbfn generate --n 100 --space-group Fm-3m --elements Li,O --out crystals
      symmbfn evaluate crystals --out report
      symmbfn info
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.option("--n", type=int, required=True, help="How many crystals.")
@out_option(
    "Folder to write to; a part of the same request that is there is completed.", required=True
)
@click.option(
    "--space-group",
    type=CommaSeparated(),
    help="Numbers, symbols such as Fm-3m, or crystal systems such as cubic.",
)
@click.option(
    "--elements", type=CommaSeparated(), help="These elements and no others, such as Li,O."
)
@click.option("--require", type=CommaSeparated(), help="Elements that must occur, among others.")
@click.option("--forbid", type=CommaSeparated(), help="Elements that must not occur.")
@click.option("--composition", help="Exactly this composition, such as LiFePO4.")
@click.option("--formula-units", type=int, help="In the primitive cell, with --composition.")
@click.option("--n-sites", type=int, help="Sites of the asymmetric unit.")
@click.option("--n-atoms", type=int, help="Atoms of the primitive cell.")
@click.option(
    "--template",
    type=click.Path(exists=True, dir_okay=False),
    help="CIF whose space group and Wyckoff positions to use.",
)
@click.option(
    "--keep",
    type=CommaSeparated(),
    default=[],
    help="What else of the template to use: elements, coordinates, lattice.",
)
@click.option(
    "--lattice",
    type=float,
    nargs=6,
    help="a b c alpha beta gamma of the conventional cell, in Angstrom and degrees.",
)
@click.option(
    "--condition",
    type=Assignment(),
    multiple=True,
    help="PROPERTY=VALUE to aim at; once for each property.",
)
@click.option("--guidance", type=float, default=0.0, help="How strongly to aim at it.")
@click.option("--steps", type=int, default=50, help="Steps of the sampler.")
@click.option(
    "--method",
    type=click.Choice(["bayes", "noise-reduced"]),
    default="noise-reduced",
    help="Sampler: the paper's, or ours with fresh noise in each step.",
)
@click.option(
    "--temperature",
    type=float,
    default=0.8,
    help="Of the sampler's noise: lower, crystals are likelier and more alike.",
)
@seed_option
@precision_option("float32")
@click.option("--batch-size", type=NumberOrAuto(), default="auto", help="Crystals in a batch.")
@device_option("auto")
@model_option
@click.option("--progress/--no-progress", default=True, help="Show a bar.")
def generate(condition, space_group, keep, **options):
    """Generate crystals, with whatever is asked of them.

    Writes a CIF and a POSCAR file for each, all of them as crystals.extxyz, and a table as
    samples.csv and samples.parquet. A request that cannot be met is refused before any work is
    done.

    \b
    Examples:
      symmbfn generate --n 8 --out crystals
      symmbfn generate --n 100 --space-group Fm-3m --elements Li,O --out oxides
      symmbfn generate --n 20 --composition TiO2 --seed 1 --out titania
      symmbfn generate --n 20 --template MgAl2O4.cif --require Mg,O --forbid Al --out spinels
      symmbfn generate --n 20 --condition formation_energy_per_atom=-2.8 --guidance 0.5 --out stable
    """
    from symmbfn.generation import generate

    request = {name: value for name, value in options.items() if value is not None}
    if space_group is not None:
        request["space_group"] = space_group
    made = generate(condition=dict(condition) or None, keep=tuple(keep), **request)
    columns = ["formula", "space_group", "found_group", "wyckoff", "density", "valid"]
    click.echo(made.table[columns].to_string(max_rows=20))
    click.echo(f"{len(made.table)} crystals are in {options['out']}.")


@main.command()
@click.argument("structures")
@out_option("Folder for the report.", default="report")
@click.option("--train", help="Crystals to compare with, for novelty.")
@click.option("--val", help="Further crystals for novelty.")
@click.option("--test", help="Crystals to compare with, for coverage and distances.")
@click.option("--hull", help="CSV table of formulas and energies; by default the package's.")
@click.option(
    "--relaxations",
    type=int,
    help="How many crystals to relax, from the first on; 0: no stability; by default all.",
)
@click.option("--seconds", type=float, help="That one crystal took to generate, for the costs.")
@workers_option
@device_option("auto")
def evaluate(structures, device, **options):
    """Measure STRUCTURES: validity, coverage, distances, novelty and stability.

    STRUCTURES is a folder or zip of CIF files, a CSV or parquet table with a column `cif`, an
    extxyz file, or a data set that `symmbfn encode` made. If none of --train, --val and --test is
    given, they are MP-20's. Writes a row for each crystal and a summary with confidence intervals.

    \b
    Examples:
      symmbfn evaluate crystals
      symmbfn evaluate crystals --out report --relaxations 64
      symmbfn evaluate mine.csv --train my_training_set.csv --relaxations 0
    """
    from symmbfn.evaluation import evaluate

    report = evaluate(structures, device=resolve_device(device), **options)
    click.echo(str(report))
    click.echo(f"\n{options['out'] / 'structures.csv'} has a row for each crystal.")


@main.command()
@click.argument("source")
@click.option("--val", help="Crystals to validate on; by default a part of SOURCE.")
@click.option(
    "--run-dir",
    required=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the run; a run that is there goes on.",
)
@click.option(
    "--preset",
    type=click.Choice(["paper", "base"]),
    default="paper",
    help="Settings of the model: the paper's or ours.",
)
@click.option(
    "--set",
    "changes",
    type=Assignment(),
    multiple=True,
    help="A setting that differs from the preset, such as hidden=256.",
)
@click.option(
    "--properties",
    type=CommaSeparated(),
    default=[],
    help="Numbers of the data that the model can be asked for.",
)
@click.option(
    "--eval-n",
    type=int,
    default=0,
    help="Crystals to generate and score every --eval-every epochs; 0: none.",
)
@click.option(
    "--epochs",
    type=int,
    default=2000,
    help="Passes over the data; 0: as many as --max-minutes allow.",
)
@click.option("--batch-size", type=int, default=256, help="Crystals, of all processes together.")
@click.option("--lr", type=float, default=1e-3, help="Learning rate at the start.")
@click.option(
    "--optimizer",
    type=click.Choice(["adam", "muon"]),
    default="adam",
    help="muon: for the matrices of the layers, Adam for the rest.",
)
@click.option(
    "--schedule",
    type=click.Choice(["plateau", "cosine"]),
    default="plateau",
    help="Of the learning rate.",
)
@click.option("--ema-decay", type=float, default=0.999, help="Of the averaged weights.")
@click.option("--max-grad-norm", type=float, default=1.0, help="Gradients are cut at this norm.")
@click.option("--validate-every", type=int, default=10, help="Epochs between validations.")
@click.option("--eval-every", type=int, default=50, help="Epochs between scores.")
@click.option(
    "--max-minutes",
    type=float,
    default=float("inf"),
    help="Stop after this long; started again, the run goes on.",
)
@seed_option
@device_option("cpu")
@precision_option("auto")
def train(source, val, run_dir, preset, changes, properties, eval_n, device, **config):
    """Train a model on SOURCE.

    SOURCE is mp20, which comes with the package; a CSV or parquet table, a folder or zip of CIF
    files, or an extxyz file; or a .safetensors file that `symmbfn encode` made, which needs --val.
    For mp20 and .safetensors files, torch, numpy, safetensors and click are all that has to be
    installed. `symmbfn generate --model` takes the file model.safetensors of the run.

    \b
    Examples:
      symmbfn train mp20 --run-dir runs/mp20 --preset base --epochs 400 --device cuda
      symmbfn train mine.csv --run-dir runs/mine --properties band_gap --set hidden=256
      symmbfn train train.safetensors --val val.safetensors --run-dir runs/lean
      torchrun --standalone --nproc_per_node 2 -m symmbfn train mp20 --run-dir runs/two
    """
    from symmbfn.train import TrainConfig, train

    data, validation = training_data(source, val)
    settings = model_settings(preset, changes, properties)
    train(
        run_dir,
        data.crystals,
        validation.crystals,
        TrainConfig(device=resolve_device(device), **config),
        model_settings=settings,
        y=data.targets(properties),
        eval_fn=scorer(validation.crystals, eval_n),
    )
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one speaks
        click.echo(f"The model is {run_dir / 'model.safetensors'}.")


def training_data(source, val):
    "Data sets to train on and to validate on."
    from symmbfn.data import load_dataset, load_mp20

    names = [source] if val is None else [source, val]
    if all(name.endswith(".safetensors") for name in names):
        if val is None:
            raise ValueError(f"{source} is one data set: give another to validate on, --val FILE.")
        return load_dataset(source)[0], load_dataset(val)[0]
    if names == ["mp20"]:
        splits = load_mp20()
    else:
        from symmbfn.datasets import load_data

        splits = load_data(source if val is None else dict(train=source, val=val))
    return splits["train"], splits["val"]


def model_settings(preset, changes, properties):
    "The settings of a preset with some of them changed."
    from symmbfn.model import BASE, PAPER

    settings = dict(paper=PAPER, base=BASE)[preset]
    for name, value in changes:
        if name not in settings or name == "properties":
            known = ", ".join(name for name in settings if name != "properties")
            raise ValueError(f"The model has no setting {name!r}: choose among {known}.")
        if isinstance(settings[name], float) and type(value) is int:
            value = float(value)
        if type(value) is not type(settings[name]):
            kind = type(settings[name]).__name__
            raise ValueError(f"The setting {name} is {value!r}: give a value of type {kind}.")
        settings = settings | {name: value}
    return settings | dict(properties=properties)


def scorer(crystals, n):
    "What scores the model on its way, or None."
    if n == 0:
        return None
    from symmbfn.generation import make_eval_fn

    return make_eval_fn(crystals, n)


@main.command()
@click.argument("source")
@out_option("Data set to write, a .safetensors file.", required=True)
@workers_option
def encode(source, out, workers):
    """Encode the crystals of SOURCE as tensors, for training on machines without pymatgen.

    SOURCE is a CSV or parquet table, a folder or zip of CIF files, or an extxyz file. Columns that
    hold numbers become properties. Rows that cannot be used are counted and listed.

    \b
    Examples:
      symmbfn encode mine.csv --out mine.safetensors
      symmbfn encode folder_of_cifs --out crystals.safetensors --workers 2
    """
    from symmbfn.data import save_dataset
    from symmbfn.datasets import encode_source

    if out.suffix != ".safetensors":
        raise ValueError(f"{out} is no name for a data set: give one that ends in .safetensors.")
    data = encode_source(source, workers=workers)
    save_dataset(out, data, meta=dict(source=Path(source).name))
    properties = ", ".join(data.properties) or "no properties"
    click.echo(f"{out} has {len(data)} crystals with {properties}.")


@main.command()
@model_option
def info(model):
    """Say what is installed: version, weights, data and devices.

    \b
    Examples:
      symmbfn info
      symmbfn info --model runs/mp20/model.safetensors
    """
    click.echo(f"symmbfn {__version__}")
    for title, lines in (
        ("weights", weights_lines(model)),
        ("data", data_lines()),
        ("devices", device_lines()),
    ):
        click.echo(f"\n{title}")
        for line in lines:
            click.echo(f"  {line}")


def size_of(path):
    return f"{path.stat().st_size / 1e6:.1f} MB"


def weights_lines(path):
    "What a model is and how it was trained."
    from symmbfn.model import load

    trained = load(path)
    path = Path(path or Path(__file__).parent / "weights.safetensors")
    weights = sum(p.numel() for p in trained.model.parameters())
    properties = ", ".join(trained.model.settings["properties"]) or "none"
    lines = [
        f"{path.name}: {size_of(path)}, {weights:,} weights",
        f"properties to ask for: {properties}",
    ]
    about = (trained.meta or {}).get("training", trained.meta) or {}
    if {"epoch", "crystals"} <= about.keys():
        machine = f" on {about['machine']}" if "machine" in about else ""
        lines.append(
            f"trained on {about['crystals']:,} crystals for {about['epoch']} epochs{machine}"
        )
    return lines


def data_lines():
    "The data files of the package, with sizes and counts."
    contents = {
        "mp20.safetensors": mp20_contents,
        "mp_hull.csv.gz": hull_contents,
        "mp20_test_fingerprints.safetensors": lambda path: "fingerprints of MP-20's test set",
    }
    folder = Path(__file__).parent
    return [
        f"{name}: {size_of(folder / name)}, {describe(folder / name)}"
        for name, describe in contents.items()
        if (folder / name).exists()
    ]


def mp20_contents(path):
    from symmbfn.data import load_mp20

    counts = (f"{len(data):,} ({split})" for split, data in load_mp20().items())
    return f"crystals: {', '.join(counts)}"


def hull_contents(path):
    with gzip.open(path, "rt") as file:
        entries = sum(1 for line in file) - 1
    return f"energies of {entries:,} compositions"


def resolve_device(device):
    "The device that 'auto' stands for."
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


CPU_FEATURES = dict(avx2="AVX2", avx512_f="AVX512", avx512_bf16="AVX512-BF16", amx_bf16="AMX-BF16")


def device_lines():
    "The processors, what they can do, and the precision that 'auto' stands for on each."
    import torch

    from symmbfn.train import resolve_precision

    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    features = [label for name, label in CPU_FEATURES.items() if found.get(name)]
    cpu = ", ".join([f"{torch.get_num_threads()} threads", *features])
    lines = [f"cpu: {cpu}; precision 'auto' is {resolve_precision('auto', 'cpu')}"]
    for i in range(torch.cuda.device_count()):
        precision = resolve_precision("auto", f"cuda:{i}")
        lines.append(f"cuda:{i}: {torch.cuda.get_device_name(i)}; precision 'auto' is {precision}")
    return lines if len(lines) > 1 else [*lines, "no GPU that torch can use"]


if __name__ == "__main__":
    main(prog_name="symmbfn")
