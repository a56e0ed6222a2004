"""The command line: `symmbfn COMMAND`, or `python -m symmbfn COMMAND`.

Exit codes: 0, done; 1, failed while running; 2, wrong usage or a request that is refused. An error
is one line on stderr. Everything heavy is imported inside the commands, so that help comes at once.
The options are the parameters of the Python functions, with dashes for underscores.
"""

import gzip
import json
import os
from pathlib import Path

import click

from symmbfn import __version__


def refused(
    error,  # exception of a request that makes no sense
):  # exception that click prints as "Error: ..."
    "Put the error into one line, to end with exit code 2."
    exception = click.ClickException(" ".join(str(error).split()))
    exception.exit_code = 2
    return exception


def failed(
    error,  # exception that came up during the work
):  # exception that click prints as "Error: ..."
    "Put the error into one line, to end with exit code 1."
    # some exceptions have no text, so their type must do
    return click.ClickException(" ".join(str(error).split()) or type(error).__name__)


class Commands(click.Group):
    """Commands that end with one line and an exit code in case of an error, without a traceback.

    Functions of the package raise ValueError for what makes no sense. Errors of other kinds, such
    as TypeError, are mistakes in the program and keep their traceback."""

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
    "Names with commas between them, which become a list of str."

    name = "a,b,..."

    def convert(self, value, param, context):
        if isinstance(value, list):  # a default
            return value
        return [word.strip() for word in value.split(",") if word.strip()]


class NumberOrAuto(click.ParamType):
    "A whole number, which becomes an int, or the word 'auto'."

    name = "integer|auto"

    def convert(self, value, param, context):
        if value == "auto" or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor 'auto'.", param, context)


class Assignment(click.ParamType):
    "NAME=VALUE, which becomes a pair. The value is a number, true, false, or else text."

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


NO_TARGET = ("none", None)  # what --condition none becomes


class Target(Assignment):
    "NAME=VALUE, which becomes a pair, or the word none, which becomes NO_TARGET."

    def convert(self, value, param, context):
        return NO_TARGET if value == "none" else super().convert(value, param, context)


def targets_of(
    pairs,  # (name, value) of each --condition
) -> dict:  # property -> value to aim at; empty: nothing
    "Read the words of --condition. Raises ValueError for a property with two targets."
    if NO_TARGET in pairs and len(pairs) > 1:
        raise ValueError("--condition none stands beside another target: give one of them.")
    if len(dict(pairs)) < len(pairs):
        raise ValueError("A property is given two targets: give --condition once for each.")
    return {} if NO_TARGET in pairs else dict(pairs)


class Site(click.ParamType):
    """ELEMENT:POSITION or ELEMENT:POSITION:X,Y,Z, which becomes a triple for `parse_request`.

    What is left empty, as the element in ":4a", is open and becomes None."""

    name = "element:position[:x,y,z]"

    def convert(self, value, param, context):
        if isinstance(value, tuple):
            return value
        element, *rest = value.split(":")
        if len(rest) not in (1, 2):
            self.fail(f"{value!r} is not of the form ELEMENT:POSITION[:X,Y,Z].", param, context)
        position, *coordinates = rest
        try:
            x = [float(number) for number in coordinates[0].split(",")] if coordinates else None
        except ValueError:
            self.fail(f"{coordinates[0]!r} is not of the form X,Y,Z.", param, context)
        return element or None, position or None, x


class OutPath(click.Path):
    "A path to write to. An empty one, as of an unset shell variable, is not the current folder."

    def convert(self, value, param, context):
        if value == "":
            self.fail("It is empty: name what to write to.", param, context)
        return super().convert(value, param, context)


def out_option(
    what,  # help text
    **settings,  # of `click.option`: default, required
):
    "Make the option --out, a path, which is the same for all commands but for its help text."
    return click.option("--out", type=OutPath(path_type=Path), help=what, **settings)


seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, help="The same seed gives the same result."
)
workers_option = click.option(
    "--workers", type=click.IntRange(1), help="Processes; by default one for each core, 8 at most."
)
model_option = click.option(
    "--model",
    type=click.Path(exists=True, dir_okay=False),
    help="Weights to use: model.safetensors of a training run; by default those of the package.",
)


def connect(context, parameter, address):
    "Connect to the scheduler of --scheduler; until the command ends."
    if address is None:
        return None
    from symmbfn.scaling import Scheduler

    scheduler = Scheduler(address)
    context.call_on_close(scheduler.close)
    return scheduler


scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    callback=connect,
    help="Compute in the workers of a Dask scheduler, such as tcp://host:8786; needs "
    "symmbfn[dask].",
)


def device_option(default):
    "Make the option --device."
    return click.option(
        "--device", default=default, help="cpu, cuda, or auto: a GPU if there is one."
    )


def precision_option(default):
    "Make the option --precision."
    return click.option(
        "--precision",
        type=click.Choice(["float32", "bfloat16", "auto"]),
        default=default,
        help="Precision of the network; auto: bfloat16 where the hardware is fast at it.",
    )


progress_option = click.option(
    "--progress/--no-progress", default=True, help="Show a progress bar."
)
hull_option = click.option(
    "--hull", help="CSV table of formulas and energies; by default the package's."
)
scale_option = click.option(
    "--scale",
    type=click.Choice(["elements", "calibrated", "paper"]),
    help="Another scale of energies above the hull, see notebook 32_calibration.",
)


def add_options(
    options,  # list of what `click.option` returns
):  # decorator of a command
    "Give a command several options, in the order of the list."

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


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
      symmbfn screen --n 20 --elements Li,O --out oxides
      symmbfn predict --composition SrTiO3 --out titanate
      symmbfn evaluate crystals --out report
      symmbfn info
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


prefer_option = click.option(
    "--prefer",
    help="Factors on the probabilities of elements, such as Na=2,K=1.5; below 1: rather not.",
)
# what crystals are to be
REQUEST_OPTIONS = [
    click.option(
        "--space-group",
        "--crystal-system",
        "space_group",
        type=CommaSeparated(),
        help="Numbers, ranges such as 221-230, symbols such as Fm-3m, or systems such as cubic.",
    ),
    click.option(
        "--elements",
        type=CommaSeparated(),
        help="Each of these elements and no others, such as Li,O.",
    ),
    click.option("--require", type=CommaSeparated(), help="Elements that must occur; others may."),
    click.option("--forbid", type=CommaSeparated(), help="Elements that must not occur."),
    prefer_option,
    click.option("--composition", help="Exactly this composition, such as LiFePO4."),
    click.option(
        "--formula-units", type=int, help="Formula units in the primitive cell, with --composition."
    ),
    click.option("--n-sites", type=int, help="Sites in the asymmetric unit."),
    click.option("--n-atoms", type=int, help="Atoms in the primitive cell."),
    click.option(
        "--template",
        type=click.Path(exists=True, dir_okay=False),
        help="CIF whose space group and Wyckoff positions to use.",
    ),
    click.option(
        "--keep",
        type=CommaSeparated(),
        default=[],
        help="What else of the template to use: elements, coordinates, lattice.",
    ),
    click.option(
        "--lattice",
        type=float,
        nargs=6,
        help="a b c alpha beta gamma of the conventional cell, in Angstrom and degrees.",
    ),
    click.option(
        "--site",
        "sites",
        type=Site(),
        multiple=True,
        help="A site that must occur, such as Ti:2a or Ti:2a:0,0,0; once for each site.",
    ),
]
best_option = click.option(
    "--best",
    type=float,
    default=1.0,
    help="Share of the sampled crystals to return: those of lowest energy as they are, by CHGNet.",
)
# how they are sampled
SAMPLING_OPTIONS = [
    click.option(
        "--condition",
        type=Target(),
        multiple=True,
        help="Property and value to aim at; once for each property. Without it: an energy below "
        "the hull, e_above_hull=-0.05. The word none: nothing.",
    ),
    click.option(
        "--guidance", type=float, default=0.0, help="How strongly to aim at the properties."
    ),
    click.option("--steps", type=int, default=50, help="Steps of the sampler."),
    click.option(
        "--method",
        type=click.Choice(["bayes", "noise-reduced"]),
        default="noise-reduced",
        help="Sampler: bayes is the paper's; noise-reduced draws fresh noise in each step.",
    ),
    click.option(
        "--temperature",
        type=float,
        default=0.9,
        help="Scale of the sampler's noise; the lower, the likelier and the more alike the "
        "crystals.",
    ),
    precision_option("float32"),
    click.option(
        "--batch-size",
        type=NumberOrAuto(),
        default="auto",
        help="Crystals that are sampled at once.",
    ),
    model_option,
]
# the options of all commands that generate on request
GENERATION_OPTIONS = [*REQUEST_OPTIONS, best_option, *SAMPLING_OPTIONS]
# how crystals are relaxed
RELAXATION_OPTIONS = [
    click.option(
        "--potential",
        default="chgnet",
        help="chgnet, sevennet (pip install 'symmbfn[sevennet]'), or module:function for a "
        "function that makes a calculator of ASE.",
    ),
    click.option(
        "--symmetry",
        type=click.Choice(["keep", "free"]),
        default="keep",
        help="keep: each crystal keeps its space group when it is relaxed.",
    ),
    click.option(
        "--fmax", type=float, default=0.1, help="Largest force that is left, eV/Angstrom."
    ),
    click.option("--max-steps", type=int, default=500, help="Steps of each relaxation."),
    hull_option,
    scale_option,
]


def request_of(
    condition,  # pairs of --condition
    sites,  # triples of --site
    keep,  # list of --keep
    options,  # all other options; None: not given
):  # dict of parameters for Python
    "Turn options into parameters."
    request = {name: value for name, value in options.items() if value is not None}
    if sites:
        request["sites"] = list(sites)
    if condition:
        request["condition"] = targets_of(condition)
    return request | dict(keep=tuple(keep))


@main.command()
@click.option("--n", type=int, required=True, help="How many crystals.")
@out_option(
    "Folder to write to; if it holds a part of the same request, that is completed.", required=True
)
@add_options(GENERATION_OPTIONS)
@click.option(
    "--relax",
    is_flag=True,
    help="Relax the crystals, too, into a folder named like --out with _relaxed at the end.",
)
@seed_option
@scheduler_option
@device_option("auto")
@progress_option
def generate(condition, sites, keep, relax, **options):
    """Generate crystals that fulfil a request.

    Writes a CIF and a POSCAR file for each crystal, all crystals as crystals.extxyz, and a table as
    samples.csv and samples.parquet. An impossible request is refused before any work is done.

    \b
    Examples:
      symmbfn generate --n 8 --out crystals
      symmbfn generate --n 100 --space-group Fm-3m --elements Li,O --out oxides
      symmbfn generate --n 20 --composition TiO2 --seed 1 --out titania
      symmbfn generate --n 20 --composition TiO2 --space-group 136 --site Ti:2a --out rutile
      symmbfn generate --n 20 --template MgAl2O4.cif --require Mg,O --forbid Al --out spinels
      symmbfn generate --n 20 --condition formation_energy_per_atom=-2.8 --guidance 0.5 --out stable
    """
    from symmbfn.generation import generate

    made = generate(**request_of(condition, sites, keep, options))
    columns = ["formula", "space_group", "found_group", "wyckoff", "density", "valid"]
    click.echo(made.table[columns].to_string(max_rows=20))
    click.echo(f"{len(made.table)} crystals are in {options['out']}.")
    if relax:
        relax_generated(made, options)


def relax_generated(
    made,  # what `generate` returned
    options,  # of the command
):
    "Relax crystals that were generated."
    from symmbfn.screening import relax

    # not inside --out, whose CIF files `symmbfn evaluate` would read together with those in there
    out = options["out"].with_name(options["out"].name + "_relaxed")
    shared = {name: options[name] for name in ("device", "progress", "scheduler")}
    echo_relaxed(relax(made, out=out, **shared).table, out)


def echo_relaxed(
    table,  # DataFrame that `relax` returns
    out,  # folder that was written to
):
    "Print the essence of relaxations."
    columns = ["name", "formula", "space_group", "group_relaxed", "e_above_hull", "reason_relaxed"]
    shown = [column for column in columns if column in table]
    click.echo(table[shown].to_string(max_rows=20, na_rep="-", float_format="{:.3f}".format))
    click.echo(f"{int(table['energy'].notna().sum())} relaxed crystals are in {out}.")


@main.command()
@click.argument("structures")
@out_option(
    "Folder to write to; if it holds a part of the same relaxations, that is completed.",
    required=True,
)
@add_options(RELAXATION_OPTIONS)
@workers_option
@scheduler_option
@device_option("auto")
@progress_option
def relax(structures, **options):
    """Relax STRUCTURES with a potential.

    STRUCTURES is a folder or zip of CIF files, a CSV or parquet table with a column `cif`, an
    extxyz file, or a data set that `symmbfn encode` made. Writes CIF and POSCAR files,
    crystals.extxyz, and a table with energies above the hull, as relaxed.csv and relaxed.parquet.
    A crystal that fails has the reason in its row.

    \b
    Examples:
      symmbfn relax crystals --out relaxed
      symmbfn relax mine.extxyz --symmetry free --fmax 0.02 --out relaxed
      symmbfn relax mine.csv --potential sevennet --out relaxed
      symmbfn relax mine.csv --potential mace.calculators:mace_mp --out relaxed
    """
    from symmbfn.screening import relax

    echo_relaxed(relax(structures, **options).table, options["out"])


@main.command()
@click.option("--n", type=int, required=True, help="How many different, novel crystals to find.")
@out_option(
    "Folder to write to; if it holds a part of the same screen, that goes on.", required=True
)
@click.option(
    "--max-energy",
    type=float,
    default=0.1,
    help="Energy above the hull up to which crystals are listed, eV/atom.",
)
@click.option(
    "--known",
    multiple=True,
    help="Known crystals beside MP-20, in any format that `symmbfn evaluate` reads; once for each.",
)
@click.option(
    "--max-crystals",
    type=int,
    help="Stop after the block with which so many are generated; by default 100 times --n.",
)
@click.option(
    "--max-minutes",
    type=float,
    default=float("inf"),
    help="Stop after the block that is at work at this time; started again, the screen goes on.",
)
@click.option("--block-size", type=int, default=64, help="Crystals that are generated at a time.")
@add_options(GENERATION_OPTIONS)
@add_options(RELAXATION_OPTIONS)
@seed_option
@workers_option
@scheduler_option
@device_option("auto")
@progress_option
def screen(condition, sites, keep, **options):
    """Search for novel crystals near the hull, and rank them.

    Crystals are generated, those that are invalid or copies are left out, the rest is relaxed,
    placed on the hull and compared with MP-20, until --n are found that are different, novel and at
    most --max-energy above the hull. Writes the list as ranking.csv and ranking.parquet, its
    crystals into the folder crystals, the best twelve as best.png, every crystal with its fate as
    generated.csv, and how many passed each step as funnel.csv. Known crystals are listed too.

    \b
    Examples:
      symmbfn screen --elements Li,P,S --space-group cubic --n 50 --out lips
      symmbfn screen --composition SrTiO3 --n 3 --max-minutes 20 --out titanate
      symmbfn screen --require Na,Cl --n 10 --known mine.csv --max-energy 0.05 --out halides
    """
    from symmbfn.screening import screen

    found = screen(**request_of(condition, sites, keep, options))
    columns = ["formula", "e_above_hull", "known", "group_relaxed", "competing_phases", "flags"]
    look = dict(index=False, na_rep="-", float_format="{:.3f}".format)
    click.echo(found.table[columns].head(20).to_string(**look))
    click.echo(f"\n{found.funnel.to_string(index=False)}")
    click.echo(f"\nThe ranked list is {options['out'] / 'ranking.csv'}.")


@main.command()
@click.option("--composition", required=True, help="Such as SrTiO3.")
@click.option("--n", type=int, default=20, help="How many different candidates.")
@out_option(
    "Folder to write to; if it holds a part of the same prediction, that goes on.", required=True
)
@click.option(
    "--rank",
    type=click.Choice(["energy", "likelihood"]),
    default="energy",
    help="energy: of the relaxed candidates; likelihood: the model's own, and nothing is relaxed.",
)
@click.option(
    "--formula-units", type=int, help="Formula units in the primitive cell; by default any number."
)
@RELAXATION_OPTIONS[0]
@click.option("--steps", type=int, default=50, help="Steps of the sampler.")
@model_option
@seed_option
@workers_option
@device_option("auto")
@progress_option
def predict(**options):
    """Predict the structure of a composition.

    Candidates get the space groups and Wyckoff positions of related known crystals, some also
    others. Those that are different are relaxed and ranked. Writes the list as ranking.csv and
    ranking.parquet, and its crystals into the folder crystals, the best first.

    \b
    Examples:
      symmbfn predict --composition SrTiO3 --n 20 --out titanate
      symmbfn predict --composition TiO2 --formula-units 2 --n 10 --out titania
      symmbfn predict --composition MgAl2O4 --rank likelihood --out spinel
    """
    from symmbfn.prediction import predict

    found = predict(**options)
    columns = ["rank", "formula", "energy", "surprisal", "group_relaxed", "wyckoff", "count"]
    if options["rank"] == "likelihood":  # nothing is relaxed
        columns = ["rank", "formula", "surprisal", "space_group", "wyckoff", "count"]
    look = dict(index=False, na_rep="-", float_format="{:.3f}".format)
    click.echo(found.table[columns].head(20).to_string(**look))
    click.echo(f"\nThe ranked list is {options['out'] / 'ranking.csv'}.")


@main.command()
@click.argument("structures")
@click.option("--n", type=int, required=True, help="How many variations of each crystal.")
@out_option(
    "Folder to write to; if it holds a part of the same variations, that is completed.",
    required=True,
)
@click.option(
    "--forget",
    type=float,
    default=0.5,
    help="Share that is forgotten, up to 1: the nearer to 0, the nearer to the crystal.",
)
@click.option(
    "--keep",
    type=CommaSeparated(),
    default=["positions"],
    help="What stays as it is: some of positions, elements, coordinates, lattice.",
)
@click.option("--allow", type=CommaSeparated(), help="Elements that may occur; by default all.")
@click.option("--forbid", type=CommaSeparated(), help="Elements that must not occur.")
@prefer_option
@add_options(SAMPLING_OPTIONS)
@seed_option
@device_option("auto")
@progress_option
def vary(structures, condition, keep, **options):
    """Vary crystals: forget a part of each, and complete it anew.

    STRUCTURES is a CIF, a folder or zip of CIF files, a CSV or parquet table with a column `cif`,
    or an extxyz file. Space group and number of sites of each crystal stay. Writes the files that
    `symmbfn generate` writes; the table says of each variation which crystal it comes from.

    \b
    Examples:
      symmbfn vary spinel.cif --n 20 --out spinels
      symmbfn vary spinel.cif --n 8 --forget 0.2 --keep elements --out near_spinel
      symmbfn vary mine.csv --n 4 --forget 1 --keep positions,coordinates --forbid Pb --out others
    """
    from symmbfn.variation import vary

    made = vary(structures, **request_of(condition, (), keep, options))
    columns = ["formula", "space_group", "wyckoff", "density", "origin", "same_as_origin"]
    click.echo(made.table[columns].to_string(max_rows=20))
    click.echo(f"{len(made.table)} crystals are in {options['out']}.")


@main.command()
@click.argument("structures")
@out_option(
    "File to write: .db (ASE), .optimade.json, .chemiscope.json or .chemiscope.json.gz.",
    required=True,
)
def export(structures, out):
    """Write crystals as a file for other programs.

    STRUCTURES is a folder that a command wrote, or any other source of crystals. What the folder's
    table or the source says of each crystal goes with it. The ending of --out says the format.
    A crystal that cannot be read is named, and nothing is written.

    \b
    Examples:
      symmbfn export crystals --out crystals.db
      symmbfn export relaxed --out relaxed.optimade.json
      symmbfn export mine.csv --out mine.chemiscope.json.gz
    """
    from symmbfn.exporting import export

    click.echo(f"{export(structures, out)} crystals are in {out}.")


@main.command()
@click.argument("structures")
@out_option("Folder for the report.", default="report")
@click.option("--train", help="Training set: crystals that are not in it are novel.")
@click.option("--val", help="Validation set: novelty is counted for this set, too.")
@click.option("--test", help="Test set, for coverage and distances.")
@hull_option
@scale_option
@click.option(
    "--relaxations",
    type=click.IntRange(0),
    help="How many crystals to relax, from the first on; 0: no stability; by default all.",
)
@click.option(
    "--seconds", type=float, help="Seconds that one crystal took to generate, for the costs."
)
@workers_option
@scheduler_option
@device_option("auto")
def evaluate(structures, device, scale, **options):
    """Measure STRUCTURES: validity, coverage, distances, novelty and stability.

    STRUCTURES is a folder or zip of CIF files, a CSV or parquet table with a column `cif`, an
    extxyz file, or a data set that `symmbfn encode` made. If none of --train, --val and --test is
    given, they are MP-20's. Writes a table with a row for each crystal, and a summary with
    confidence intervals.

    \b
    Examples:
      symmbfn evaluate crystals
      symmbfn evaluate crystals --out report --relaxations 64
      symmbfn evaluate mine.csv --train my_training_set.csv --relaxations 0
    """
    from symmbfn.evaluation import evaluate, write_report
    from symmbfn.generation import device_of_work
    from symmbfn.stability import load_hull, on_scale

    if scale:
        options["hull"] = on_scale(load_hull(options["hull"]), scale)
    device = device_of_work(device, options["scheduler"])
    report = evaluate(structures, device=device, **options)
    click.echo(str(report))
    # `evaluate` warns if its report can't be written; for a command that is an error
    write_report(report, options["out"])
    click.echo(f"\n{options['out'] / 'structures.csv'} has a row for each crystal.")


@main.command()
@click.argument("source")
@click.option("--val", help="Crystals to validate on; by default a part of SOURCE.")
@click.option(
    "--run-dir",
    required=True,
    type=OutPath(file_okay=False, path_type=Path),
    help="Folder of the run; if it holds an earlier part of the same run, that goes on.",
)
@click.option(
    "--preset",
    type=click.Choice(["paper", "base"]),
    help="Settings of the model: those of the paper, or ours, which are called base; by default "
    "the paper's, or those of --pretrained.",
)
@click.option(
    "--pretrained",
    help="Weights to begin with: model.safetensors of a training run, or the word package.",
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
    help="Columns of the data that the model can later be asked for, such as band_gap.",
)
@click.option(
    "--eval-n",
    type=click.IntRange(0),
    default=0,
    help="Crystals to generate and score every --eval-every epochs; 0: none.",
)
@click.option(
    "--epochs",
    type=int,
    default=2000,
    help="Passes over the data; 0: as many as --max-minutes allow.",
)
@click.option(
    "--batch-size", type=int, default=256, help="Crystals in a batch, of all processes together."
)
@click.option("--lr", type=float, default=1e-3, help="Learning rate at the start.")
@click.option(
    "--optimizer",
    type=click.Choice(["adam", "muon"]),
    default="adam",
    help="muon: Muon for the matrices of the layers, and Adam for the rest.",
)
@click.option(
    "--schedule",
    type=click.Choice(["plateau", "cosine"]),
    default="plateau",
    help="Schedule of the learning rate.",
)
@click.option("--ema-decay", type=float, default=0.999, help="Decay of the average of the weights.")
@click.option(
    "--max-grad-norm", type=float, default=1.0, help="Larger gradients are scaled to this norm."
)
@click.option("--validate-every", type=int, default=10, help="Epochs between validations.")
@click.option(
    "--patience",
    type=int,
    default=None,
    help="Stop after so many validations without a lower loss, and keep the best model.",
)
@click.option(
    "--frozen",
    is_flag=True,
    default=False,
    help="Train nothing but the encoding of the properties, with --pretrained.",
)
@click.option(
    "--encoding-lr",
    type=float,
    default=None,
    help="Learning rate of the encoding of properties that --pretrained doesn't know; by default "
    "--lr.",
)
@click.option("--eval-every", type=int, default=50, help="Epochs between scores, with --eval-n.")
@click.option(
    "--max-minutes",
    type=float,
    default=float("inf"),
    help="Stop after this time; started again, the run goes on.",
)
@seed_option
@device_option("cpu")
@precision_option("auto")
def train(source, val, run_dir, preset, pretrained, changes, properties, eval_n, device, **config):
    """Train a model on SOURCE.

    SOURCE is mp20, which comes with the package; a CSV or parquet table, a folder or zip of CIF
    files, or an extxyz file; or a .safetensors file that `symmbfn encode` made, which needs --val.
    Training on mp20 and on .safetensors files needs torch, numpy, safetensors and click, and no
    other package. `symmbfn generate --model` takes the file model.safetensors of the run.

    \b
    Examples:
      symmbfn train mp20 --run-dir runs/mp20 --preset base --epochs 400 --device cuda
      symmbfn train mine.csv --run-dir runs/mine --properties band_gap --set hidden=256
      symmbfn train mine.csv --run-dir runs/mine --pretrained package --epochs 20 --lr 3e-4
      symmbfn train train.safetensors --val val.safetensors --run-dir runs/lean
      torchrun --standalone --nproc_per_node 2 -m symmbfn train mp20 --run-dir runs/two
    """
    from symmbfn.train import TrainConfig, train

    config = TrainConfig(device=device, **config)  # refuses what cannot work before data is read
    pretrained = pretrained_model(pretrained, preset)
    settings = model_settings(preset or "paper", changes, properties, pretrained)
    data, validation = training_data(source, val)
    train(
        run_dir,
        data.crystals,
        validation.crystals,
        config,
        model_settings=settings,
        y=data.targets(properties),
        pretrained=pretrained,
        eval_fn=scorer(validation.crystals, eval_n),
    )
    if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun starts, one speaks
        click.echo(f"The model is {run_dir / 'model.safetensors'}.")


@main.command()
@click.argument("source")
@click.option(
    "--properties",
    type=CommaSeparated(),
    help="Columns of the data that the model can later be asked for, such as band_gap; by default "
    "none, and the structures alone are learnt.",
)
@out_option(
    "Folder for the model; if it holds a part of the same run, that goes on.", required=True
)
@click.option(
    "--val", help="Structures to hold out; by default those that SOURCE comes with, or a tenth."
)
@model_option
@click.option(
    "--frozen",
    is_flag=True,
    default=False,
    help="Train nothing but the encoding of the properties.",
)
@click.option(
    "--epochs",
    type=int,
    default=20,
    help="Passes over the data at most; 0: as many as --max-minutes allow.",
)
@click.option(
    "--patience",
    type=int,
    default=5,
    help="Stop after so many epochs without a lower loss of the held-out structures.",
)
@click.option("--batch-size", type=int, default=64, help="Structures in a batch.")
@click.option("--lr", type=float, default=2e-5, help="Learning rate at the start.")
@click.option(
    "--encoding-lr",
    type=float,
    default=1e-2,
    help="Learning rate at the start of the encoding of new properties.",
)
@click.option(
    "--optimizer",
    type=click.Choice(["adam", "muon"]),
    default="muon",
    help="muon: Muon for the matrices of the layers, and Adam for the rest.",
)
@click.option(
    "--max-minutes",
    type=float,
    default=float("inf"),
    help="Stop after the epoch in which this is over; started again, the run goes on.",
)
@seed_option
@workers_option
@device_option("auto")
@precision_option("auto")
@progress_option
def finetune(source, **options):
    """Train weights further on SOURCE, with new properties or without.

    SOURCE is mp20, which comes with the package; a CSV or parquet table, a folder or zip of CIF
    files, an extxyz file, or a data set that `symmbfn encode` made. Structures that are held out
    say when to stop, and which epoch was best. `symmbfn generate --model` takes the file
    model.safetensors of the folder; it can be asked for the old properties and the new ones.

    \b
    Examples:
      symmbfn finetune mp20 --properties band_gap --out runs/gap
      symmbfn finetune mine.csv --properties hardness --frozen --out runs/hard
      symmbfn finetune folder_of_cifs --epochs 50 --max-minutes 30 --out runs/mine
    """
    from symmbfn.finetuning import describe_tuned, finetune

    tuned = finetune(source, **options)
    click.echo(describe_tuned(tuned))
    click.echo(f"The model is {options['out'] / 'model.safetensors'}.")


def pretrained_model(
    pretrained,  # path of a trained model; 'package'; None: begin with random weights
    preset,  # preset of settings that was asked for, or None
):  # Model, or None
    "Load the model to begin with. Raises ValueError if a preset of settings was asked for too."
    from symmbfn.model import load

    if pretrained is None:
        return None
    if preset is not None:
        raise ValueError("--pretrained has settings of its own: leave out --preset.")
    return load(None if pretrained == "package" else pretrained).model


def training_data(
    source,  # 'mp20', or a path as for `symmbfn train`
    val,  # path of the validation set; None: a part of source
):  # two Datasets
    """Load the data sets to train on and to validate on.

    Without `load_data`, if possible, since `symmbfn.datasets` needs further packages."""
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


def model_settings(
    preset,  # 'paper' or 'base'
    changes,  # pairs (name, value) of settings that differ from the preset
    properties,  # names of the properties that the model can be asked for
    pretrained=None,  # Model to begin with, which has settings of its own
):  # dict of settings for `symmbfn.model.Model`
    "Change some settings of a preset. Raises ValueError for an unknown name or a wrong type."
    from symmbfn.model import BASE, PAPER

    settings = dict(paper=PAPER, base=BASE)[preset] if pretrained is None else pretrained.settings
    for name, value in changes:
        if name not in settings or name == "properties":
            known = ", ".join(name for name in settings if name != "properties")
            raise ValueError(f"The model has no setting {name!r}: choose among {known}.")
        # 1 for 1.0, and 256.0 for 256; True is an int too, and is refused
        if isinstance(settings[name], float) and type(value) is int:
            value = float(value)
        if type(settings[name]) is int and type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not type(settings[name]):
            kind = type(settings[name]).__name__
            raise ValueError(f"The setting {name} is {value!r}: give a value of type {kind}.")
        settings = settings | {name: value}
    return settings | dict(properties=properties)


def scorer(
    crystals,  # Crystals to compare with
    n,  # how many crystals to generate for a score; 0: no scores
):  # eval_fn of `symmbfn.train.train`, or None
    "Make the function that scores the model while it trains."
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
@click.argument("folder", default="runs")
@click.option(
    "--plot",
    type=OutPath(dir_okay=False, path_type=Path),
    help="Picture of the losses to write, such as losses.png; needs symmbfn[notebooks].",
)
def runs(folder, plot):
    """Compare the training runs in FOLDER; by default in runs.

    Prints a line for each run, the lowest validation loss first: epochs and minutes so far, the
    last training loss, the lowest validation loss, the best score of generated crystals, and the
    settings in which the runs differ.

    \b
    Examples:
      symmbfn runs
      symmbfn runs runs/sweep --plot losses.png
    """
    import pandas as pd

    from symmbfn.train import compare_runs

    table = pd.DataFrame(compare_runs(folder)).dropna(axis=1, how="all")
    click.echo(table.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))
    if plot:
        from symmbfn.figures import plot_runs

        plot_runs(folder, list(table["run"])).savefig(plot, dpi=150)
        click.echo(f"The losses are drawn in {plot}.")


@main.command()
@model_option
def info(model):
    """Print what is installed: version, weights, data and devices.

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
    "Say how large a file is, such as '4.8 MB'."
    return f"{path.stat().st_size / 1e6:.1f} MB"


def weights_lines(
    path,  # of a weights file; None: the weights of the package
):  # list of lines
    "Describe a model, and how it was trained if the file says so."
    from symmbfn.model import load

    trained = load(path)
    path = Path(path or Path(__file__).parent / "weights.safetensors")
    weights = sum(p.numel() for p in trained.model.parameters())
    properties = ", ".join(trained.model.settings["properties"]) or "none"
    lines = [
        f"{path.name}: {size_of(path)}, {weights:,} weights",
        f"properties to ask for: {properties}",
    ]
    # the package's weights hold this under "training", while a training run makes it the whole meta
    about = (trained.meta or {}).get("training", trained.meta) or {}
    if {"epoch", "crystals"} <= about.keys():
        machine = f" on {about['machine']}" if "machine" in about else ""
        lines.append(
            f"trained on {about['crystals']:,} crystals for {about['epoch']} epochs{machine}"
        )
    return lines


def data_lines():  # list of lines
    "Describe the data files of the package, with sizes and counts."
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
    "Count the crystals of each split."
    from symmbfn.data import load_mp20

    counts = (f"{len(data):,} ({split})" for split, data in load_mp20().items())
    return f"crystals: {', '.join(counts)}"


def hull_contents(path):
    "Count the entries of the hull's table."
    with gzip.open(path, "rt") as file:
        entries = sum(1 for _ in file) - 1  # without the header
    return f"energies of {entries:,} compositions"


# what PyTorch calls a feature -> what people call it
CPU_FEATURES = dict(avx2="AVX2", avx512_f="AVX512", avx512_bf16="AVX512-BF16", amx_bf16="AMX-BF16")


def device_lines():  # list of lines
    "Describe the processors: what they can do, and the precision that 'auto' stands for on each."
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
