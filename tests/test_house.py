"""What is said of versions in several places is the same in all of them."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import jaxpeft

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
GITHUB = ROOT / ".github"


def workflow(name):
    return yaml.safe_load((GITHUB / "workflows" / name).read_text())


def supported():
    """{python: jax} of the table in VERSIONS.md, with the JAX as far as the workflow names it."""
    rows = re.findall(r"^\| (3\.\d+) \| (.*?) \|$", (ROOT / "VERSIONS.md").read_text(), re.M)
    assert rows
    return {python: "newest" if "newest" in jax else jax for python, jax in rows}


def test_the_workflow_checks_the_versions_that_are_supported():
    matrix = workflow("ci.yml")["jobs"]["checks"]["strategy"]["matrix"]["include"]
    assert {row["python"]: row["jax"] for row in matrix} == supported()


def test_every_supported_python_is_one_that_the_package_says_it_runs_on():
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    known = PROJECT["project"]["classifiers"]
    listed = [x.rpartition(" ")[2] for x in known if re.search(r":: 3\.\d+$", x)]
    assert listed == list(supported()) and listed[0] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest


def test_the_readme_and_the_bounds_name_the_same_versions():
    (oldest,) = {jax for jax in supported().values() if jax != "newest"}
    assert f"jax>={oldest}" in PROJECT["project"]["dependencies"]
    # "JAX 0.10.2 (Python 3.11) and 0.12 (Python 3.12 and 3.13) are tested."
    old, python, new, *later = re.search(
        r"JAX (\S+) \(Python (\S+)\) and (\S+) \(Python (\S+) and (\S+)\)",
        (ROOT / "README.md").read_text(),
    ).groups()
    assert supported()[python] == old == oldest
    assert list(supported())[1:] == later and set(list(supported().values())[1:]) == {"newest"}
    assert f"the newest, {new} |" in (ROOT / "VERSIONS.md").read_text()


def test_the_version_is_the_same_wherever_it_stands():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = PROJECT["project"]["version"]
    assert jaxpeft.__version__ == version == citation["version"]
    assert citation["license"] == PROJECT["project"]["license"]


def test_a_commit_is_checked_by_the_ruff_that_lints_the_tree():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (repo["rev"] for repo in hooks if "ruff" in repo["repo"])
    lint = PROJECT["project"]["optional-dependencies"]["lint"]
    assert f"ruff=={ruff.removeprefix('v')}" in lint


def test_workflows_and_hooks_call_what_the_makefile_has():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    files = [
        *GITHUB.glob("workflows/*.yml"),
        ROOT / ".pre-commit-config.yaml",
        ROOT / "VERSIONS.md",
    ]
    files += [ROOT / name for name in ("CONTRIBUTING.md", "VERSIONS.md", ".pre-commit-config.yaml")]
    pattern = r"(?:run: |entry: |`)make ([a-z-]+)"
    called = {name for file in files for name in re.findall(pattern, file.read_text())}
    assert {"dist", "types", "docs"} <= called <= targets
    stages = re.search(r"for stage in (.*?); do", (ROOT / ".ci" / "run").read_text()).group(1)
    assert set(stages.split()) <= targets


def test_a_release_is_published_after_its_files_were_tested():
    jobs = workflow("release.yml")["jobs"]
    assert any("make dist TAG=" in step.get("run", "") for step in jobs["dist"]["steps"])
    assert jobs["publish"]["needs"] == "dist"
    assert jobs["publish"]["permissions"] == {"id-token": "write"}


@pytest.mark.parametrize("name", ["bug", "feature", "method"])
def test_issue_forms_have_what_github_asks_of_them(name):
    form = yaml.safe_load((GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert form["name"] and form["description"]
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert {part["type"] for part in form["body"]} <= kinds
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in fields}) == len(fields)
    assert all(part["attributes"]["label"] for part in fields)


def test_contributing_leads_to_the_page_of_versions():
    assert "(VERSIONS.md)" in (ROOT / "CONTRIBUTING.md").read_text()
