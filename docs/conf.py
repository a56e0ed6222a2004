"""The site: `sphinx-build -M html . _docs -c docs` in the root of the repository, without network.

Sphinx with MyST-NB shows the committed notebooks as they are (nothing is executed), README as the
front page, the pages of docs/ and an API reference read from signatures and their comments.
"""

import gzip
import json
import re
import shutil
from importlib.metadata import files
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments

DOCS = Path(__file__).parent
ROOT = DOCS.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))

project = "symmbfn"
author = "The symmbfn developers"
copyright = author
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.linkcode",
    "sphinx.ext.mathjax",
    "sphinx_click",
    "sphinx_copybutton",
]
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "docs/api/*.md",
    "nbs/*.ipynb",
]
html_theme = "furo"
html_title = "symmbfn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_copy_source = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"

# Notebooks and Markdown
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
copybutton_selector = "div.highlight pre"

# API: a docstring is plain text, and in it `name` is code
default_role = "code"
smartquotes_action = "qe"  # quotes and ellipses; `--` starts an option
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 80
add_module_names = False


# Equations: MathJax draws them as SVG, so that no font has to be loaded, which browsers refuse to
# pages opened as files. For the same reason the crystals of the explorer are a script, not JSON.
mathjax_path = "tex-svg-full.js"
EXPLORER = ["chemiscope.min.js", "explorer-data.js", "explorer.js"]


def add_scripts(app):
    "Take two files out of the packages that bring them, and make one of the explorer's crystals."
    folder = Path(app.outdir) / "_static"
    folder.mkdir(parents=True, exist_ok=True)
    for package, name in [("sphinx-mathjax-offline", mathjax_path), ("chemiscope", EXPLORER[0])]:
        (source,) = [file for file in files(package) if file.name == name]
        shutil.copyfile(source.locate(), folder / name)
    crystals = gzip.decompress((ROOT / "nbs/tables/explorer.json.gz").read_bytes())
    (folder / EXPLORER[1]).write_bytes(b"const EXPLORER = " + crystals)


def load_explorer(app, pagename, templatename, context, doctree):
    "Only one page needs the viewer, which is large."
    if pagename == "docs/explorer":
        for name in EXPLORER:
            app.add_js_file(name, loading_method="defer")


# Notebooks as the site shows them


def markdown_anchor(link):
    "Jupyter makes an anchor of a heading by hyphens alone, GitHub and MyST as for .md files."
    anchor = re.sub(r"[^\w-]", "", link[2].lower())
    return f"]({link[1]}#{anchor})"


def adapt_links(text):
    "Links to headings, in a Markdown text, to the anchors that they have here."
    return re.sub(r"\]\(([^)#:\s]*)#([^)]+)\)", markdown_anchor, text)


def adapt_source(app, docname, content):
    "Adapt links to headings; leave out nbdev's directives (`#| export`) and cells of nothing else."
    if Path(app.env.doc2path(docname)).suffix != ".ipynb":
        content[0] = adapt_links(content[0])
        return
    page = json.loads(content[0])
    for cell in page["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            source = re.sub(r"^#\| .*\n?", "", source, flags=re.MULTILINE).strip("\n")
        cell["source"] = adapt_links(source) if cell["cell_type"] == "markdown" else source
    page["cells"] = [cell for cell in page["cells"] if cell["source"]]
    content[0] = json.dumps(page)


def keep_numbers(app, doctree):
    "Hand equations with numbers of their own to MathJax as they are: Sphinx's frame forbids those."
    for equation in doctree.findall(nodes.math_block):
        text = equation.astext()
        if r"\tag" in text:
            equation["no-wrap"] = True
            equation[:] = [nodes.Text(rf"\[{text}\]")]


# The contents, beside every page. README is also GitHub's front page and doesn't show them.


def title(path):
    "The number of a notebook and its first heading."
    page = json.loads(path.read_text(encoding="utf-8"))
    heading = "".join(page["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
    heading = heading.removeprefix("Experiment: ")
    return f"{path.stem[:2]} {heading[0].upper()}{heading[1:]}"


def contents():
    "The hidden tables of contents: captions, and the pages under each."

    def notebooks(first, last, exporting=(True, False)):
        chosen = [path for path in NOTEBOOKS if first <= path.stem[:2] <= last]
        chosen = [path for path in chosen if (path.stem in MODULES.values()) in exporting]
        return [f"{title(path)} <nbs/{path.stem}>" for path in chosen]

    pages = {
        "Start": ["A tour <nbs/index>", "Crystals to explore <docs/explorer>"],
        "The method": notebooks("00", "12"),
        "Crystals and measures": notebooks("13", "19") + notebooks("20", "99", [True]),
        "Experiments": notebooks("20", "99", [False]),
        "Reference": [
            "API <docs/api/index>",
            "Model card <nbs/31_weights>",
            "Data card <docs/data_card>",
            "Notation and differences <docs/differences>",
            "Glossary <docs/glossary>",
            "Equations <docs/equations>",
            "Changes <CHANGELOG>",
            "Contributing <CONTRIBUTING>",
        ],
    }
    for caption, entries in pages.items():
        yield from ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```"]


def add_contents(app, docname, content):
    if docname == root_doc:
        content[0] += "\n".join(contents())


def read_contents_again(app, env, added, changed, removed):
    "A new notebook changes the contents, though not README."
    return [root_doc]


def copy_front_page(app, exception):
    "README.html is also index.html."
    if exception is None and app.builder.format == "html":
        shutil.copyfile(Path(app.outdir) / "README.html", Path(app.outdir) / "index.html")


# The reference of the package


def module_notebooks():
    "Dict: module -> stem of the notebook that exports it, in the order of the notebooks."
    found = {}
    for path in NOTEBOOKS:
        line = re.search(r"#\| default_exp (\w+)", path.read_text(encoding="utf-8"))
        if line:
            found[line[1]] = path.stem
    return found


MODULES = module_notebooks()


INTRODUCTION = """# API

What `import symmbfn` offers: {py:func}`~symmbfn.structures.encode` and
{py:func}`~symmbfn.structures.decode` between crystals and tensors,
{py:func}`~symmbfn.datasets.load_data`, {py:func}`~symmbfn.model.load` for weights,
{py:func}`~symmbfn.generation.generate`, {py:func}`~symmbfn.evaluation.evaluate`,
{py:func}`~symmbfn.screening.relax`, {py:func}`~symmbfn.screening.screen`,
{py:func}`~symmbfn.finetuning.finetune`, {py:func}`~symmbfn.prediction.predict`,
{py:func}`~symmbfn.variation.vary` and {py:func}`~symmbfn.exporting.export`. The same from the
shell: [the command line](command_line.md). Everything else is in the modules, in the order of the
notebooks that export them.
"""


def write_reference(app):
    "Pages for the modules and the command line, which extensions fill, and one that lists them."
    pages = {}
    for module, stem in MODULES.items():
        source = f"Exported from [{stem}](../../nbs/{stem}.ipynb)."
        pages[module] = f"# {module}\n\n{source}\n\n{directive('automodule', f'symmbfn.{module}')}"
    command = directive("click", "symmbfn.__main__:main", ":prog: symmbfn", ":nested: full")
    pages["command_line"] = f"# Command line\n\n{command}"
    entries = "\n".join(["command_line", *MODULES])
    pages["index"] = f"{INTRODUCTION}\n```{{toctree}}\n:maxdepth: 1\n\n{entries}\n```\n"
    folder = DOCS / "api"
    folder.mkdir(exist_ok=True)
    for name, page in pages.items():
        path = folder / f"{name}.md"
        if (
            not path.exists() or path.read_text(encoding="utf-8") != page
        ):  # only what is new is read
            path.write_text(page, encoding="utf-8")


def directive(name, argument, *options):
    "A directive of reStructuredText within Markdown."
    lines = [f".. {name}:: {argument}", *(f"   {option}" for option in options)]
    return "\n".join(["```{eval-rst}", *lines, "```", ""])


def plain(text):
    "Text whose marks mean nothing to reStructuredText, but for those of code."
    pieces = text.split("`")
    pieces[::2] = [re.sub(r"([*|]|_(?!\w))", r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def add_comments(app, what, name, thing, options, lines):
    "Add the comments beside the parameters to a docstring; a list gets empty lines around it."
    text = plain("\n".join(lines))
    text = re.sub(r"(?m)^((?:- .*\n(?:  .*\n)*)+)", r"\n\1\n", text)
    lines[:] = text.splitlines() + [""]
    if what not in ("function", "method", "class"):
        return
    try:
        comments = docments(thing)
    except (TypeError, OSError, SyntaxError):  # a thing without source
        return
    for parameter, comment in comments.items():
        if comment:
            field = "returns" if parameter == "return" else f"param {parameter}"
            lines.append(f":{field}: {' '.join(plain(comment).split())}")


def linkcode_resolve(domain, info):
    "Lead to the notebook that defines a name; browsers find the text there."
    module = info["module"].removeprefix("symmbfn.")
    name = info["fullname"].split(".")[-1]
    if module in MODULES:
        return f"../../nbs/{MODULES[module]}.html#:~:text={name}"


def setup(app):
    app.connect("builder-inited", add_scripts)
    app.connect("builder-inited", write_reference)
    app.connect("env-get-outdated", read_contents_again)
    app.connect("source-read", adapt_source)
    app.connect("doctree-read", keep_numbers)
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", add_comments)
    app.connect("html-page-context", load_explorer)
    app.connect("build-finished", copy_front_page)
