"""Spec files written for one test, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fusecli.errors import ExitCode, UsageError
from fusecli.spec import Spec, read_spec


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], Spec]:
    """Reads text as the file `fuse.yaml` of the working folder."""
    monkeypatch.chdir(tmp_path)

    def read(text: str | bytes) -> Spec:
        Path("fuse.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_spec("fuse.yaml")

    return read


@pytest.fixture
def wrong(read: Callable[[str | bytes], Spec]) -> Callable[[str | bytes], list[str]]:
    """The problems of a spec, as the user sees them."""

    def wrong(text: str | bytes) -> list[str]:
        with pytest.raises(UsageError) as caught:
            read(text)
        assert caught.value.exit_code is ExitCode.USAGE
        return [str(problem) for problem in caught.value.problems]

    return wrong
