"""The package as others get it: versions that agree, pinned tools, a licence, types, and no torch to build it."""

from __future__ import annotations

import email
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import normkit
from normkit.cli.environment import DISTRIBUTIONS
from normkit.cli.errors import EXTRAS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINNED = {
    canonicalize_name(Requirement(line).name): Requirement(line)
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


def requirements(lines: list[str]) -> list[Requirement]:
    """Requirements of other packages; ``normkit[lab]`` stands for its own extras."""
    return [Requirement(line) for line in lines if not line.startswith("normkit")]


def all_requirements() -> list[Requirement]:
    lists = [
        PROJECT["build-system"]["requires"],
        PROJECT["project"]["dependencies"],
        *PROJECT["dependency-groups"].values(),
    ]
    installed_by_make = [PROJECT["project"]["optional-dependencies"][extra] for extra in ("lab", "export")]
    return requirements([line for lines in (*lists, *installed_by_make) for line in lines])


@pytest.mark.parametrize("requirement", all_requirements(), ids=str)
def test_development_pins_one_version_that_the_package_accepts(requirement):
    pin = PINNED[canonicalize_name(requirement.name)]
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert requirement.specifier.contains(specifier.version, prereleases=True)


def test_a_pin_is_a_version_and_nothing_of_one_machine():
    for name, pin in PINNED.items():
        assert pin.url is None
        assert pin.marker is None
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), (
            f"{name}{pin.specifier}: no local versions, no ranges"
        )


def test_building_needs_no_torch():
    assert "torch" not in {requirement.name for requirement in requirements(PROJECT["build-system"]["requires"])}


def test_installing_asks_for_torch_tyro_rich_and_nothing_else():
    required = {requirement.name for requirement in requirements(PROJECT["project"]["dependencies"])}
    assert required == {"torch", "tyro", "rich"}


def test_the_command_line_names_the_right_extra_for_every_module():
    extras = PROJECT["project"]["optional-dependencies"]
    declared = {(r.name, extra) for extra, lines in extras.items() for r in requirements(lines)}
    assert {(DISTRIBUTIONS.get(module, module), extra) for module, extra in EXTRAS.items()} == declared


def test_the_version_is_the_same_everywhere():
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert citation
    assert citation[1] == normkit.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.search(r"^## \[(\d\S*)\]", changelog, re.MULTILINE)
    if ".dev" in normkit.__version__:
        assert "## [Unreleased]" in changelog
        assert (
            normkit.__version__.partition(".dev")[0] in changelog.partition("## [Unreleased]")[2].partition("\n## [")[0]
        )
    else:
        assert released
        assert released[1] == normkit.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built by the tools of this environment: no network, no compiled code."""
    target = tmp_path_factory.mktemp("wheel")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "NORMKIT_NATIVE": "0"})
    (built,) = target.glob("normkit-*.whl")
    return built


def test_the_wheel_holds_the_package_its_types_and_its_licence(wheel):
    source = ROOT / "src"
    expected = {str(path.relative_to(source)) for path in (source / "normkit").rglob("*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert expected | {"normkit/py.typed"} <= names
    assert not {name for name in names if not name.startswith(("normkit/", "normkit-"))}
    licence = next(name for name in names if name.endswith("licenses/LICENSE"))
    assert b"Apache License" in zipfile.ZipFile(wheel).read(licence)


def test_the_wheel_says_what_it_is(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata_file = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(archive.read(metadata_file))
    assert metadata["Version"] == normkit.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == {"lab", "export", "dask", "ray", "all"}
    scripts = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert b"normkit = normkit.cli:main" in archive.read(scripts)


def test_no_file_names_a_place_on_one_machine():
    places = re.compile(r"/(?:home|Users|root)/\w")
    files = [
        *(ROOT / "src").rglob("*.py"),
        *(ROOT / "docs").rglob("*.md"),
        *ROOT.glob("*.md"),
        ROOT / "Makefile",
        ROOT / "constraints.txt",
    ]
    found = [f"{path.name}: {match[0]}" for path in files if (match := places.search(path.read_text()))]
    assert found == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tests_run_with_nan_in_fresh_memory(dtype):
    assert torch.empty(3, 5, dtype=dtype).isnan().all()
    assert torch.ones(3, 5, dtype=dtype).new_empty(4).isnan().all()
