"What is made from the notebooks is in step with them, and the house keeps its order."

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import metadata, packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mlkit

root = Path(__file__).parent.parent
torch_free = ("core", "data", "pipeline", "bundle", "serve", "monitor", "cli")
floors = {"core": 0, "data": 1, "pipeline": 1, "train": 2, "bundle": 2, "vision": 3, "nlp": 3, "timeseries": 3, "optimize": 4, "serve": 4, "monitor": 4, "cli": 5}


def tool(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    "A copy of the tracked and new files of the checkout, to run writing tools in."
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    target = tmp_path_factory.mktemp("copy")
    listed = subprocess.run(["git", "-C", root, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    return target


def test_the_package_is_what_the_notebooks_export(copy):
    shutil.rmtree(copy / "mlkit")
    (copy / "mlkit").mkdir()
    subprocess.run([tool("nbdev-export")], cwd=copy, check=True, capture_output=True)
    made = {p.relative_to(copy): p.read_text() for p in (copy / "mlkit").rglob("*.py")}
    there = {p.relative_to(root): p.read_text() for p in (root / "mlkit").rglob("*.py")}
    assert made.keys() == there.keys()
    assert [str(p) for p in made if made[p] != there[p]] == [], "run nbdev-export"


def test_the_notebooks_are_clean(copy):
    before = {p: p.read_text() for p in (copy / "nbs").rglob("*.ipynb")}
    subprocess.run([tool("nbdev-clean")], cwd=copy, check=True, capture_output=True)
    assert [str(p.relative_to(copy)) for p, text in before.items() if json.loads(p.read_text()) != json.loads(text)] == [], "run nbdev-clean"


def test_cleaning_keeps_the_parameters_tag(copy):
    subprocess.run([tool("nbdev-clean")], cwd=copy, check=True, capture_output=True)
    for path in (copy / "nbs" / "pipelines").rglob("*.ipynb"):
        assert any("parameters" in c["metadata"].get("tags", []) for c in json.loads(path.read_text())["cells"]), path


def test_the_readme_is_what_its_notebook_says():
    subprocess.run([sys.executable, "-m", "mlkit.core.docs", "readme", "--check"], cwd=root, check=True)


def test_the_readme_holds_two_commands_that_do_everything():
    commands = [line for block in re.findall(r"```bash\n(.*?)```", (root / "README.md").read_text(), re.S) for line in block.splitlines() if "&&" in line]
    assert "pip install" in commands[0] and "mlkit run vision" in commands[0]
    assert "pip install" in commands[1] and "pytest" in commands[1]


def test_settings_are_the_one_source_of_metadata():
    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root / "settings.ini")
    described = metadata("mlkit")
    said = subprocess.run([sys.executable, "-m", "mlkit", "--version"], capture_output=True, text=True).stdout.strip()
    assert described["Version"] == mlkit.__version__ == said == settings["DEFAULT"]["version"], "after a change of settings.ini: pip install -e ."
    assert described["Summary"] == settings["DEFAULT"]["description"]
    torch_bringers = re.compile(r"^(torch|timm|transformers|pytorch-lightning|torchvision)\b")
    assert not [r for r in settings["DEFAULT"]["requirements"].split() if torch_bringers.match(r)]


def modules_of(rooms) -> list[str]:
    paths = (p.relative_to(root).with_suffix("") for room in rooms for p in (root / "mlkit" / room).rglob("*.py"))
    return [".".join(p.parts).removesuffix(".__init__") for p in paths]


def import_without(unimportable, modules: list[str]):
    "Import modules in a fresh interpreter that cannot import others."
    code = f"import sys, importlib\nsys.modules |= dict.fromkeys({sorted(unimportable)!r})\nfor name in {modules!r}: importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_torch_free_wing_imports_without_torch():
    modules = modules_of(torch_free)
    assert len(modules) > 20
    import_without({"torch", "torchvision", "pytorch_lightning", "lightning", "timm", "transformers", "torchmetrics"}, modules)


def brought_by(name: str, found: set[str] | None = None) -> set[str]:
    "Return the names of the distributions that an installation without extras brings, itself included."
    found = set() if found is None else found
    found.add(canonicalize_name(name))
    for requirement in map(Requirement, requires(name) or []):
        if canonicalize_name(requirement.name) not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            brought_by(requirement.name, found)
    return found


def test_plain_mlkit_needs_nothing_that_only_an_extra_brings():
    plain = brought_by("mlkit")
    others = {module for module, owners in packages_distributions().items() if not plain.intersection(map(canonicalize_name, owners))}
    import_without(others, modules_of(torch_free))


@pytest.mark.parametrize("room", sorted(p.parent.name for p in root.glob("mlkit/*/__init__.py") if "front_door" in p.read_text()))
def test_a_star_brings_all_that_a_room_shows(room):
    names = {}
    exec(f"from mlkit.{room} import *", names)
    assert len(names) > 5 and names.keys() - {"__builtins__"} == set(dir(sys.modules[f"mlkit.{room}"]))


def test_the_front_door_leads_to_every_room():
    assert {p.parent.name for p in (root / "mlkit").glob("*/__init__.py")} - {"cli"} <= set(dir(mlkit))


def resolved(path: Path):
    "List the modules of mlkit that a module imports."
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("mlkit."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *filter(None, [node.module])])
            if module.startswith("mlkit"):
                yield from [module] if module != "mlkit" else [f"mlkit.{a.name}" for a in node.names]


def test_imports_point_down_the_floors():
    wrong = []
    for path in (root / "mlkit").rglob("*.py"):
        room = path.relative_to(root / "mlkit").parts[0]
        for module in resolved(path):
            other = module.split(".")[1]
            if room in floors and other in floors and other != room and floors[other] >= floors[room]:
                wrong.append(f"{path.relative_to(root)} imports {module}")
    assert wrong == []


def help_of(command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command.split(), "--help"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, f"there is no `{command}`"
    return done.stdout


def test_workflows_call_what_exists():
    workflows = {p.name: yaml.safe_load(p.read_text()) for p in (root / ".github" / "workflows").glob("*.yml")}
    assert {"ci.yml", "pipelines.yml", "release.yml", "docs.yml"} <= workflows.keys()
    commands = [step["run"] for w in workflows.values() for job in w["jobs"].values() for step in job["steps"] if "run" in step]
    assert [c for c in commands if c.startswith(".")] == [".ci/run"] and os.access(root / ".ci" / "run", os.X_OK)
    called = [m for c in commands if (m := re.match(r"(?:python -m )?(mlkit(?:\.core\.docs)? \w+)(.*)", c))]
    assert len(called) >= 3
    for command, rest in (m.groups() for m in called):
        assert set(re.findall(r"--[a-z-]+", rest)) <= set(re.findall(r"--[a-z-]+", help_of(command))), command
    assert [path for c in commands for path in re.findall(r"\btests/\S+", c) if not (root / path).exists()] == []


def test_the_readme_names_no_command_or_option_that_does_not_exist():
    text = (root / "README.md").read_text()
    commands = {f"mlkit {name}" for name in re.findall(r"(?:`|&& )mlkit ([a-z]+)", text)}
    helps = "".join(map(help_of, sorted(commands)))
    options = {o for code in re.findall(r"`([^`\n]+)`", text) for o in re.findall(r"--[a-z][a-z-]+", code)} - {"--check"}
    assert len(commands) > 5 and options <= set(re.findall(r"--[a-z-]+", helps))


def test_importing_mlkit_imports_no_room():
    code = "import sys, mlkit; print(sorted(m for m in sys.modules if m.split('.')[0] in ('mlkit', 'polars', 'numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "['mlkit']"
    code = "import sys\nfrom mlkit.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(sorted(m for m in sys.modules if m.startswith('mlkit.')))"
    loaded = ast.literal_eval(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()[-1])
    assert loaded and {name.split(".")[1] for name in loaded} == {"cli"}


def test_nothing_machine_bound_stands_in_a_notebook():
    for path in (root / "nbs").rglob("*.ipynb"):
        outputs = json.dumps([c.get("outputs") for c in json.loads(path.read_text())["cells"]])
        assert os.path.expanduser("~/") not in outputs and str(root) not in outputs, path


def test_links_between_notebooks_lead_somewhere():
    wrong = []
    for path in (root / "nbs").rglob("*.ipynb"):
        text = "\n".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "markdown")
        wrong += [f"{path.relative_to(root)}: {link}" for link in re.findall(r"\]\(([^):#]+)\)", text) if not (path.parent / link).exists()]
    assert wrong == []
