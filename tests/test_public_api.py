"""The public names: all there, all importable, all documented."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from types import ModuleType

import pytest

import graphprune

MODULES = ["graphprune"] + [
    info.name for info in pkgutil.walk_packages(graphprune.__path__, prefix="graphprune.")
]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_docstring_and_an_honest_all(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), f"{name}.__all__ names {public}, which is not there"


@pytest.mark.parametrize("name", MODULES)
def test_every_public_module_says_what_is_public(name: str) -> None:
    module = importlib.import_module(name)
    own = [
        k for k, v in vars(module).items() if getattr(v, "__module__", None) == name and k[0] != "_"
    ]
    assert hasattr(module, "__all__") or not own


@pytest.mark.parametrize("name", sorted(graphprune.__all__))
def test_every_public_name_is_documented(name: str) -> None:
    assert getattr(graphprune, name).__doc__


@pytest.mark.parametrize("name", ["capture", "compile", "apply", "analyze", "evaluate"])
def test_functions_are_not_hidden_by_modules_of_the_same_name(name: str) -> None:
    for module in MODULES:
        importlib.import_module(module)
    assert not isinstance(getattr(graphprune, name), ModuleType)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        graphprune.nonsense  # noqa: B018
    assert "compile" in dir(graphprune)


def test_importing_the_package_imports_no_pass() -> None:
    code = (
        "import sys, graphprune, graphprune.pipeline, graphprune.compiler, graphprune.cli\n"
        "print([m for m in sys.modules if m.startswith('graphprune.passes.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
