import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    options = ["--no-index", "--quiet", "--wheel-dir", str(folder)]
    subprocess.run([*command, *options, str(ROOT)], check=True, cwd=folder)
    (path,) = folder.glob("rankflow-*.whl")
    return path


def test_the_wheel_holds_every_module_script_and_preset_and_the_type_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "rankflow").rglob("*.py")}
    view = ROOT / "rankflow" / "report" / "view"
    modules |= {str(path.relative_to(ROOT)) for path in view.iterdir() if path.is_file()}
    presets = {f"rankflow/budgets/{path.name}" for path in (ROOT / "budgets").glob("*.toml")}
    assert len(presets) >= 5
    assert modules | presets | {"rankflow/py.typed"} <= names
    assert not any(name.startswith(("tests/", "examples/", "budgets/")) for name in names)


def test_a_preset_is_found_where_the_wheel_is_installed(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "from rankflow.specs.budget import list_budgets, load_budget\n"
        "print(list_budgets()['fixed'], load_budget('fixed').rank)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == [str(tmp_path / "rankflow" / "budgets" / "fixed.toml"), "8.0"]
