# SPDX-License-Identifier: Apache-2.0
import doctest
import importlib
import inspect
import pkgutil

import pytest

from nad_jax import core

MODULES = sorted(module.name for module in pkgutil.iter_modules(core.__path__))


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_the_docstrings_hold(name):
    module = importlib.import_module(f"nad_jax.core.{name}")
    failed, attempted = doctest.testmod(module)
    assert failed == 0
    # An example that is not collected is not run either.
    assert attempted or ">>>" not in inspect.getsource(module)


def test_the_modules_are_found():
    assert {"losses", "quantization", "rounding", "solvers"} <= set(MODULES)
