"""Threads of the command line that wait for each other leave the machine to those that work."""

from __future__ import annotations

import os

import pytest


@pytest.mark.parametrize(("given", "seen"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(cli, monkeypatch, given, seen):
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert cli("--version").code == 0
    assert os.environ["OMP_WAIT_POLICY"] == seen
