"""Installed releases against those that tests of the project ran with; which tests: integration/versions/README.md."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# package -> the oldest and the newest release
TESTED = {
    "torch": ("2.13.0", "2.13.0"),
    "axolotl": ("0.19.0", "0.19.0"),
    "peft": ("0.20.0", "0.21.2"),
    "transformers": ("5.16.1", "5.24.0"),
    "accelerate": ("1.13.0", "1.15.0"),
    "trl": ("1.9.0", "1.9.0"),
    "bitsandbytes": ("0.50.2", "0.50.2"),
    "deepspeed": ("0.18.9", "0.19.8"),
}


def installed() -> dict[str, str]:
    """package -> its release, for the packages of `TESTED` that are installed."""
    found = {}
    for name in TESTED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def untested(releases: Mapping[str, str]) -> str | None:
    """One line about the packages whose release lies outside the tested ones, or None.

    What comes after the second number, such as a patch or a local label, does not count.
    """
    outside = []
    for name, release in releases.items():
        oldest, newest = TESTED[name]
        if not Version(oldest).release[:2] <= Version(release).release[:2] <= Version(newest).release[:2]:
            tested = oldest if oldest == newest else f"{oldest} to {newest}"
            outside.append(f"{name} {release} (tested: {tested})")
    if not outside:
        return None
    return f"axolotl_spft was not tested with {', '.join(outside)}: the run goes on; if it fails, try a tested release"
