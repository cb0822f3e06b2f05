"Build mlkit from settings.ini, the one place that says what the package is and needs."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_namespace_packages, setup

cfg = ConfigParser(delimiters=["="], interpolation=None)
cfg.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = cfg["DEFAULT"]
extras = {k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")}
stages = ["mlkit.pipelines"] + [f"mlkit.pipelines.{p}" for p in find_namespace_packages("nbs/pipelines")]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=Path(cfg["readme"]).read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"], license=cfg["license"], url=cfg["git_url"],
    keywords=cfg["keywords"].split(), python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(), extras_require=extras,
    packages=find_namespace_packages(include=["mlkit", "mlkit.*"]) + stages,
    package_dir={"mlkit.pipelines": "nbs/pipelines"}, package_data={"": ["*.ipynb", "*.yaml"]},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "papermill.engine": cfg["papermill_engines"].split(),
                  "jupyter_client.kernel_provisioners": cfg["kernel_provisioners"].split()},
)
