"""Micro-batches and answers never wait for their device: no number of it is asked for, no tensor is elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "on_a_device.py"
NOTICED = {
    "a number is asked for": "DataDependentOutputException",
    "a tensor is brought here": "WaitedFor",
    "a mask counts": "DynamicOutputShapeException",
    "two devices": "devices",  # a RuntimeError whose own name and words differ by torch's version
}


@pytest.fixture(scope="module")
def raised() -> dict[str, Any]:
    """What each case raised, in a process of its own: torch's table of devices is changed there."""
    environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])}
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_waits_or_mixes_devices_is_noticed(raised: dict[str, Any]) -> None:
    assert {name: raised[name] for name, word in NOTICED.items() if word not in str(raised[name])} == {}


def test_no_micro_batch_and_no_answer_waits_for_its_device(raised: dict[str, Any]) -> None:
    found = {name: error for name, error in raised.items() if name not in NOTICED}
    assert (
        len(found) >= 4 * 5 + 3 + 12
    )  # families (three ways to learn, two to answer), SFT, reliance, on-policy, divergences
    assert found == dict.fromkeys(found)
