"""Machines on which packages are missing."""

import builtins


def without(monkeypatch, *names):
    """As on a machine that lacks these packages."""
    real = builtins.__import__

    def importing(name, *arguments, **options):
        if name.split(".")[0] in names:
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importing)
