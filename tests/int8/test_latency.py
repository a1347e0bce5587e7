from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fusecli.int8.latency import latency
from fusecli.sample import Sample


def test_latency_takes_turns_and_the_best_round(monkeypatch: pytest.MonkeyPatch):
    now, order = [0.0], list[str]()
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def model(name: str, cost: float) -> Callable[[Tensor], None]:
        def call(x: Tensor) -> None:
            order.append(name)
            # The first call is slow, and so is the machine in the middle of it all.
            slow = 50 if name not in order[:-1] else 3 if 30 < len(order) < 40 else 1
            now[0] += cost * slow

        return call

    found = latency(
        {"a": model("a", 0.5), "b": model("b", 0.25)}, Sample((torch.ones(1),)), seconds=10.0, rounds=5
    )
    assert found == {"a": pytest.approx(0.5), "b": pytest.approx(0.25)}
    # two seconds in a round: four calls of a, eight of b
    assert order[6:] == (["a"] * 4 + ["b"] * 8) * 5


def test_latency_calls_a_slow_model_once_in_a_round_without_gradients():
    seen = list[bool]()
    found = latency(
        {"m": lambda x: seen.append(torch.is_grad_enabled())}, Sample((1,)), seconds=0.0, rounds=3
    )
    assert seen == [False] * 6
    assert found["m"] > 0
