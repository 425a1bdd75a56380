"""Docstrings: examples run, arguments are those of the signature, nothing public is without."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import jaxpeft

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(jaxpeft.__path__, "jaxpeft.")
    if not name.endswith("__main__")
]


def load(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:  # an extra of training
        assert not error.name.startswith("jaxpeft"), error
        pytest.skip(f"needs {error.name}")


def public_functions(module):
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            if not name.startswith("_"):
                yield name, value


@pytest.mark.parametrize("name", ["jaxpeft", *MODULES])
def test_examples_run(name):
    module = load(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0
    # `testmod` passes by what a decorator from another module has wrapped.
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for function, value in public_functions(module):
        if hasattr(value, "__wrapped__"):
            for example in doctest.DocTestFinder().find(value.__wrapped__, function, module):
                runner.run(example)
    assert runner.summarize().failed == 0


def test_examples_of_wrapped_functions_are_found():
    (example,) = doctest.DocTestFinder().find(jaxpeft.lora.__wrapped__, "lora")
    assert len(example.examples) == 5


@pytest.mark.parametrize("name", MODULES)
def test_public_functions_say_what_they_do_and_take(name):
    module = load(name)
    for function, value in public_functions(module):
        rule = name.startswith("jaxpeft._rules.")  # a rule's primitive stands in its decorator
        doc = inspect.getdoc(value)
        assert doc or rule, f"{name}.{function} has no docstring"
        found = re.search(r"\nArgs:\n(.*?)(\n\S|\Z)", doc or "", re.S)
        if not found:
            continue
        entries = re.findall(r"^  (\*{0,2}\w[\w, *]*):", found.group(1), re.M)
        documented = [p.strip().lstrip("*") for entry in entries for p in entry.split(",")]
        taken = list(inspect.signature(value).parameters)
        assert set(documented) <= set(taken), f"{name}.{function} documents what it does not take"
        assert set(taken) <= set(documented), f"{name}.{function} is silent about an argument"


def test_every_public_name_exists_once():
    assert sorted(set(jaxpeft.__all__)) == sorted(jaxpeft.__all__)
    assert all(hasattr(jaxpeft, name) for name in jaxpeft.__all__)
