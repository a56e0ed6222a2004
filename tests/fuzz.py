"""Try damaged files on all readers: each ends as crystals, or as one ValueError in a sentence.

    python tests/fuzz.py 100000 --seed 1

mutates good files of every kind, one input after the other, and prints how many were tried, how
many of them were read and refused, and how long the slowest took. It stops at the first input that
ends in any other way, in more than 20 seconds, or in more than 4 GB of memory, and writes it to
fuzz_failure.*. `tests/test_fuzz.py` tries a few with a seed of its own."""

import argparse
import gzip
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import pandas as pd
import safetensors.torch
import torch
from ase.io import write
from pymatgen.core import Lattice, Structure
from pymatgen.io.ase import AseAtomsAdaptor

from symmbfn.data import Dataset, fit_prior, load_dataset, load_mp20, save_dataset, save_tensors
from symmbfn.model import BASE, Model, load, save_model
from symmbfn.structures import decode, load_structures, to_cif, to_structure
from symmbfn.train import read_checkpoint

SECONDS = 20  # that one input may take
GIGABYTES = 4  # of address space beside what is there at the start
# what numbers and words of files are replaced by
VALUES = "0 -1 1e400 nan inf -0.0 1e-300 999999999999999999999 ? . '' \" ; \x00 ü Xx D 1/3 x,y,z,"
VALUES = [*VALUES.split(), "", "\n", ";\n", "loop_", "data_", "#", "1" * 5000, "(" * 5000, "\ufeff"]


def good_files(folder):
    "Write a small good file of each kind; their paths."
    data = load_mp20()["val"][:6]
    structures = decode(data.crystals, primitive=True)
    cifs = list(to_cif(data.crystals))
    salt = Structure.from_spacegroup(
        "Fm-3m", Lattice.cubic(5.64), ["Na", "Cl"], [[0, 0, 0], [0.5, 0.5, 0.5]]
    )
    for i, text in enumerate([*cifs, salt.to(fmt="cif"), salt.to(fmt="cif", symprec=0.01)]):
        (folder / f"{i}.cif").write_text(text)
    (folder / "packed.cif.gz").write_bytes(gzip.compress(cifs[0].encode()))
    pd.DataFrame(dict(id=range(3), cif=cifs[:3], gap=[1.0, None, 2])).to_csv(folder / "table.csv")
    frames = [AseAtomsAdaptor.get_atoms(s, msonable=False) for s in structures[:3]]
    write(folder / "frames.extxyz", frames, format="extxyz")
    with zipfile.ZipFile(folder / "some.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i, text in enumerate(cifs[:2]):
            archive.writestr(f"{i}.cif", text)
    save_dataset(folder / "data.safetensors", Dataset(data.crystals, data.ids))
    torch.manual_seed(0)
    model = Model(**BASE | dict(hidden=4, embed=2, layers=1, freqs=1, properties=[]))
    model.standardise(data.crystals)
    save_model(folder / "model.safetensors", model, fit_prior(data.crystals))
    progress = dict(origin=dict(seed=0), step=3, rows=[dict(epoch=1)], seconds=1.0)
    save_tensors(folder / "checkpoint.safetensors", dict(a=torch.ones(3)), progress)
    return sorted(folder.iterdir())


def mutate_text(text, chance):
    "Replace, drop, repeat or cut words and lines of a text."
    lines = text.split("\n")
    for _ in range(chance.choice((1, 1, 2, 5))):
        i = chance.randrange(len(lines))
        how = chance.randrange(6)
        if how == 0:
            lines[i] = ""
        elif how == 1:
            lines.insert(i, chance.choice(lines))
        elif how == 2:
            lines[i] = lines[i][: chance.randrange(len(lines[i]) + 1)]
        elif how == 3:
            lines = lines[: max(1, i)]
        else:
            words = lines[i].split(" ")
            words[chance.randrange(len(words))] = chance.choice(VALUES)
            lines[i] = " ".join(words)
    return "\n".join(lines)


def mutate_bytes(content, chance):
    "Flip, drop, insert or cut bytes."
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        i = chance.randrange(len(content) + 1)
        how = chance.randrange(5)
        if how == 0:
            content = content[:i]
        elif how == 1:
            content[i : i + chance.randrange(1, 9)] = b""
        elif how == 2:
            content[i:i] = chance.randbytes(chance.randrange(1, 9))
        elif i < len(content):
            content[i] ^= 1 << chance.randrange(8)
        if not content:
            break
    return bytes(content)


def mutate_tensors(content, chance):
    "Change values, shapes or names of a safetensors file, which then is a whole file again."
    tensors = safetensors.torch.load(content)
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        with safetensors.safe_open(file.name, "pt") as opened:
            meta = opened.metadata()
    name = chance.choice(sorted(tensors))
    how = chance.randrange(6)
    if how == 0:
        del tensors[name]
    elif how == 1:
        tensors[name] = (
            tensors[name][: len(tensors[name]) // 2] if tensors[name].dim() else torch.ones(2)
        )
    elif how == 2:
        tensors[name + "x"] = tensors.pop(name)
    elif how == 3:
        tensors[name] = tensors[name].to(chance.choice((torch.float16, torch.int64, torch.bool)))
    elif how == 4 and tensors[name].numel():
        changed = tensors[name].clone()
        value = chance.choice((-1e30, -1, 0, 1, 1e30, float("nan"), float("inf")))
        if not changed.dtype.is_floating_point:
            value = chance.choice((0, 1, 100))
        changed.view(-1)[chance.randrange(changed.numel())] = value
        tensors[name] = changed
    elif meta:
        meta = {k: mutate_text(v, chance) for k, v in meta.items()}
    return safetensors.torch.save(tensors, meta)


def mutate(path, chance):
    "The content of a good file, changed."
    content = path.read_bytes()
    if path.suffix == ".safetensors" and chance.random() < 0.7:
        return mutate_tensors(content, chance)
    if path.suffix in (".cif", ".csv", ".extxyz") and chance.random() < 0.8:
        return mutate_text(content.decode(), chance).encode("utf-8", "surrogateescape")
    return mutate_bytes(content, chance)


def read(path):
    "Read a file with the reader of its kind. Raises ValueError if it is refused."
    if path.name.startswith("model"):
        load(path)
    elif path.name.startswith("checkpoint"):
        read_checkpoint(path.parent)
    elif path.name.startswith("data"):
        load_dataset(path)
    else:
        _, sources = load_structures(path)
        reasons = []
        for source in sources:
            try:
                to_structure(source)
            except ValueError as error:
                reasons.append(error)
        if reasons and len(reasons) == len(sources):
            raise reasons[0]


def check_refusal(error):
    "Raise AssertionError unless an error is one sentence."
    sentence = str(error)
    assert sentence.strip(), "an error without a word"
    assert len(sentence) < 20_000, f"an error of {len(sentence)} letters"


class TooSlow(BaseException):
    "Not an Exception, which a reader may take for a damaged file."


def too_slow(*_):
    raise TooSlow(f"an input took more than {SECONDS} seconds")


def try_inputs(count, seed, folder):
    "Try so many inputs; Counter of what became of them, and the seconds of the slowest."
    chance = random.Random(seed)
    (folder / "good").mkdir()
    (folder / "bad").mkdir()
    files = good_files(folder / "good")
    found, slowest = Counter(), 0.0
    signal.signal(signal.SIGALRM, too_slow)
    for _ in range(count):
        path = chance.choice(files)
        bad = folder / "bad" / path.name
        bad.write_bytes(mutate(path, chance))
        began = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            read(bad)
            found["read"] += 1
        except ValueError as error:
            check_refusal(error)
            found["refused"] += 1
        except BaseException:
            Path(f"fuzz_failure{''.join(bad.suffixes)}").write_bytes(bad.read_bytes())
            print(f"{path.name}, after {sum(found.values())} inputs", file=sys.stderr)
            raise
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - began)
        bad.unlink()
    return found, slowest


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + GIGABYTES * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found, slowest = try_inputs(given.count, given.seed, Path(folder))
    seconds = time.perf_counter() - began
    print(
        f"{found.total()} inputs in {seconds:.0f} s: {found['read']} read, "
        f"{found['refused']} refused; the slowest took {slowest:.2f} s."
    )


if __name__ == "__main__":
    main()
