"""`doctor` where torch itself is broken: the very installation it is for."""

from __future__ import annotations

import sys

import pytest
from rich.console import Console

from espalier import doctor


def test_a_broken_torch_is_named_not_tripped_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(doctor, "LIBRARIES", {"torch": ("torch", "everything", "")})
    found = doctor.examine()
    assert not found.sound
    assert found.machine.threads is None
    Console(width=120).print(doctor.table(found))
    assert "pip install" in capsys.readouterr().out
