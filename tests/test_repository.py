"What is made from the notebooks is in step with them, and the house keeps its order."

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    from importlib.metadata import metadata

    settings = configparser.ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root / "settings.ini")
    described = metadata("mlkit")
    assert described["Version"] == settings["DEFAULT"]["version"] == subprocess.run([sys.executable, "-m", "mlkit", "--version"], capture_output=True, text=True).stdout.strip()
    assert described["Summary"] == settings["DEFAULT"]["description"]
    torch_bringers = re.compile(r"^(torch|timm|transformers|pytorch-lightning|torchvision)\b")
    assert not [r for r in settings["DEFAULT"]["requirements"].split() if torch_bringers.match(r)]


def test_the_torch_free_wing_imports_without_torch():
    modules = [".".join(p.relative_to(root).with_suffix("").parts) for p in (root / "mlkit").rglob("*.py") if p.relative_to(root / "mlkit").parts[0] in torch_free]
    modules = [m.removesuffix(".__init__") for m in modules]
    code = (
        "import sys, importlib\n"
        "for name in ('torch', 'torchvision', 'pytorch_lightning', 'lightning', 'timm', 'transformers', 'torchmetrics'): sys.modules[name] = None\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert len(modules) > 20 and done.returncode == 0, done.stderr


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


def test_workflows_call_what_exists():
    workflows = {p.name: yaml.safe_load(p.read_text()) for p in (root / ".github" / "workflows").glob("*.yml")}
    assert {"ci.yml", "pipelines.yml", "release.yml", "docs.yml"} <= workflows.keys()
    commands = "\n".join(step["run"] for w in workflows.values() for job in w["jobs"].values() for step in job["steps"] if "run" in step)
    from mlkit.cli.main import main

    for word in re.findall(r"^mlkit (\w+)", commands, re.M):
        with pytest.raises(SystemExit) as ended:
            main([word, "--help"])
        assert ended.value.code == 0, word


def test_importing_mlkit_imports_no_room():
    code = "import sys, mlkit; print(sorted(m for m in sys.modules if m.split('.')[0] in ('mlkit', 'polars', 'numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "['mlkit']"
    code = "import sys\nfrom mlkit.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint(sorted(m for m in sys.modules if m.startswith('mlkit.')))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.splitlines()[-1] == "['mlkit.cli', 'mlkit.cli.main']"


def test_nothing_machine_bound_stands_in_a_notebook():
    for path in (root / "nbs").rglob("*.ipynb"):
        outputs = json.dumps([c.get("outputs") for c in json.loads(path.read_text())["cells"]])
        assert os.path.expanduser("~/") not in outputs and str(root) not in outputs, path
