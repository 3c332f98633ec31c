"""What a GPU would refuse, seen without one: `support/devices.py`, where the device is `support/fake_device.py`'s."""

import subprocess
import sys
from pathlib import Path

import pytest


def test_everything_works_elsewhere():
    """In a process of its own, as PyTorch takes a new device for good."""
    registration = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch knows no devices written in Python")
    checks = Path(__file__).parent / "support" / "devices.py"
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "--unchecked",
        str(checks),
    ]
    found = subprocess.run(words, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert found.returncode == 0, found.stdout[-4000:]
    assert " passed" in found.stdout
