from __future__ import annotations

import inspect

import pytest

from diffloss_engine import errors

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", ALL)
def test_one_root_catches_every_error(kind: type[Exception]) -> None:
    assert issubclass(kind, errors.DiffLossError)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.InputError, ValueError),
        (errors.InputTypeError, TypeError),
        (errors.ModelError, ValueError),
        (errors.BundleError, ValueError),
        (errors.IntegrityError, errors.BundleError),
        (errors.ParityError, ArithmeticError),
        (errors.MissingPackageError, ImportError),
        (errors.BackendUnavailableError, RuntimeError),
        (errors.BackendError, RuntimeError),
    ],
)
def test_each_error_is_the_builtin_a_caller_expects(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


@pytest.mark.parametrize("kind", ALL)
def test_messages_are_one_line_of_some_length(kind: type[Exception]) -> None:
    assert str(kind("a  file:\n\n  not\r\nthere\u2028")) == "a  file: not there"
    long = str(kind("begin" + "a" * 10**6 + "end"))
    assert len(long) < 5000
    assert long.startswith("begina")
    assert long.endswith("aend")


def test_every_error_is_re_exported() -> None:
    import diffloss_engine

    assert {kind.__name__ for kind in ALL} <= set(diffloss_engine.__all__)
