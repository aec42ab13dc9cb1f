"""The memory of a GPU lies in segments that grow, but where somebody wants it otherwise or where they break."""

import os
import platform
import subprocess
import sys

import pytest

from rlhf_recipes.allocator import VARIABLES, grow_segments
from rlhf_recipes.config import recipe


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-generic")


def settings() -> dict[str, str]:
    """Of torch's allocators in the environment."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_torch_takes_the_setting() -> None:
    told = "from rlhf_recipes.allocator import grow_segments; grow_segments(); import torch; "
    told += "print(torch._C._accelerator_getAllocatorSettings())"
    printed = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "expandable_segments:True"


@pytest.mark.parametrize("variable", VARIABLES)
def test_settings_of_ones_own_are_kept(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "max_split_size_mb:128")
    grow_segments()
    assert settings() == {variable: "max_split_size_mb:128"}


@pytest.mark.parametrize(
    ("system", "release"), [("Linux", "5.15.153.1-microsoft-standard-WSL2"), ("Windows", "11"), ("Darwin", "24.1.0")]
)
def test_nothing_is_set_where_segments_cannot_grow(monkeypatch: pytest.MonkeyPatch, system: str, release: str) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    grow_segments()
    assert settings() == {}


def test_every_recipe_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(sys, "argv", ["ppo"])

    @recipe("ppo")
    def main(cfg: object) -> None:
        seen.update(settings())

    main()
    assert seen == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
