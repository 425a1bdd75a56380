"""Docstrings: examples run, arguments are those of the signature, nothing public is without."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import jaxpeft
from jaxpeft._method import FACTORIES

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(jaxpeft.__path__, "jaxpeft.")
    if not name.endswith("__main__")
]


@pytest.fixture(autouse=True)
def registry():
    """An example may register a method of its own, which other tests must not see."""
    before = dict(FACTORIES)
    yield
    FACTORIES.clear()
    FACTORIES.update(before)


def is_public(name):
    """Whether users may import a module: no part of its path starts with an underscore."""
    return not any(part.startswith("_") for part in name.split("."))


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


def documented(value):
    """The arguments that the docstring of a function lists under Args; `None` without Args."""
    found = re.search(r"(?:\n|\A)Args:\n(.*?)(\n\S|\Z)", inspect.getdoc(value) or "", re.S)
    if not found:
        return None
    entries = re.findall(r"^  (\*{0,2}\w[\w, *]*):", found.group(1), re.M)
    return {p.strip().lstrip("*") for entry in entries for p in entry.split(",")}


@pytest.mark.parametrize("name", MODULES)
def test_functions_say_what_they_do_and_no_argument_is_wrong(name):
    module = load(name)
    for function, value in public_functions(module):
        rule = name.startswith("jaxpeft._rules.")  # a rule's primitive stands in its decorator
        text = inspect.getdoc(value) or ""
        assert text or rule, f"{name}.{function} has no docstring"
        headings = re.findall(r"^(Args|Returns|Raises|Example|References):$", text, re.M)
        assert len(set(headings)) == len(headings), f"{name}.{function} has {headings}"
        said, taken = documented(value), set(inspect.signature(value).parameters)
        if said is not None:
            assert said <= taken, f"{name}.{function} documents {said - taken}, not taken"
            assert taken <= said, f"{name}.{function} is silent about {taken - said}"


@pytest.mark.parametrize("name", ["jaxpeft", *filter(is_public, MODULES)])
def test_every_function_that_a_user_may_call_lists_its_arguments(name):
    """What a public module has in its `__all__`; inside the library, one line may be enough."""
    module = load(name)
    for function in getattr(module, "__all__", ()):
        value = getattr(module, function)
        if inspect.isfunction(value) and inspect.signature(value).parameters:
            assert documented(value), f"{name}.{function} has arguments and no Args section"


def test_every_public_name_exists_once():
    assert sorted(set(jaxpeft.__all__)) == sorted(jaxpeft.__all__)
    assert all(hasattr(jaxpeft, name) for name in jaxpeft.__all__)
