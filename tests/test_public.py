import importlib
import subprocess
import sys

import pytest

import rankflow


@pytest.mark.parametrize("name", rankflow.__all__)
def test_every_public_name_is_that_of_its_module(name):
    value = getattr(rankflow, name)
    assert value is getattr(importlib.import_module(value.__module__), name)
    assert name in dir(rankflow)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'RankFlw'"):
        rankflow.RankFlw  # noqa: B018


def test_importing_the_package_imports_nothing_else():
    code = "import sys, rankflow; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"
