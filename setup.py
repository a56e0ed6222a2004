"""Install symmbfn. Names, versions and requirements are read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def lines(key):
    return [line for line in cfg[key].splitlines() if line.strip()]


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    packages=["symmbfn"],
    package_data={"symmbfn": ["*.safetensors", "*.json", "*.csv", "*.csv.gz"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={
        "sevennet": lines("sevennet_requirements"),
        "notebooks": lines("notebooks_requirements"),
        "site": lines("site_requirements"),
        "dask": lines("dask_requirements"),
        "dev": lines("sevennet_requirements")
        + lines("notebooks_requirements")
        + lines("site_requirements")
        + lines("dask_requirements")
        + lines("dev_requirements"),
    },
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
    ],
    entry_points={
        "console_scripts": ["symmbfn=symmbfn.__main__:main"],
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
