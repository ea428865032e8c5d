from __future__ import annotations

import subprocess
import sys

import pytest

import pi2rt


def test_every_name_is_there() -> None:
    for name in pi2rt.__all__:
        assert getattr(pi2rt, name) is not None
    assert set(pi2rt.__all__) <= set(dir(pi2rt))


def test_there_are_no_others() -> None:
    with pytest.raises(AttributeError, match=r"^module 'pi2rt' has no attribute 'open'$"):
        pi2rt.open  # noqa: B018


def test_all_errors_are_exported() -> None:
    from pi2rt import _errors

    errors = {name for name, value in vars(_errors).items() if isinstance(value, type)}
    assert errors <= set(pi2rt.__all__)


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys; before = set(sys.modules); import pi2rt; print(*(set(sys.modules) - before))"
    run = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"trio", "numpy", "typing", "asyncio", "dataclasses"} & set(run.stdout.split())


def test_the_keywords_are_the_options() -> None:
    from dataclasses import fields
    from typing import get_type_hints

    from pi2rt.opening.options import RuntimeKeywords, RuntimeOptions

    assert list(get_type_hints(RuntimeKeywords)) == [field.name for field in fields(RuntimeOptions)]
