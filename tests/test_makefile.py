"""The Makefile and the pinned versions: what a newcomer types first."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def make(tmp_path):
    """Run make in a folder with our Makefile and a .venv that is set up: its python prints its arguments."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "<%s>" "$@"; echo\n')
    python.chmod(0o755)
    for stamp in (".ready", ".dev"):
        (tmp_path / ".venv" / stamp).touch()
    # `make test` hands its own flags and arguments down to the tests
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS")) and "ARGS" not in k}

    def run(*arguments):
        return subprocess.run(["make", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    run.folder = tmp_path
    return run


def test_help_is_the_default_and_lists_every_target(make):
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", text, re.M))
    listed = make("help").stdout
    assert make().stdout == listed
    assert (
        {line.split()[0] for line in listed.splitlines()}
        == targets
        >= {"sft", "rm", "dpo", "ppo", "eval", "plan", "report", "test", "lint", "clean"}
    )
    assert set(re.search(r"^\.PHONY: (.*)", text, re.M)[1].split()) == targets


def test_args_go_to_every_recipe_of_the_line_and_own_args_to_one(make):
    output = make("sft", "rm", "ppo", "ARGS=run=mine lora.r=32", "RM_ARGS=training.max_steps=9").stdout
    assert output.splitlines() == [
        "<-m><recipes.sft><run=mine><lora.r=32>",
        "<-m><recipes.rm><run=mine><lora.r=32><training.max_steps=9>",
        "<-m><recipes.ppo><run=mine><lora.r=32>",
    ]


def test_a_plan_gets_the_card_and_the_args_of_every_stage(make):
    assert make("plan").stdout == "<-m><recipes.plan><--sft><--rm><--dpo><--ppo>\n"
    output = make("plan", "ARGS=run=mine lora.r=32", "CARD=12", "RM_ARGS=a=1 b=2", "PPO_ARGS=c=3").stdout
    assert output == "<-m><recipes.plan><card=12><run=mine><lora.r=32><--sft><--rm><a=1><b=2><--dpo><--ppo><c=3>\n"


def test_a_report_takes_the_args_of_the_stages_on_its_line(make):
    output = make("sft", "report", "ARGS=run=mine lora.r=32").stdout
    assert output.splitlines()[1] == "<-m><recipes.report><run=mine><lora.r=32>"


def test_curves_get_their_betas_and_the_args_of_their_stages(make):
    output = make("overoptimization", "ARGS=run=mine", "BETAS=0,0.1", "RM_ARGS=a=1", "PPO_ARGS=b=2 c=3").stdout
    assert output == "<-m><recipes.overoptimization><beta=0,0.1><run=mine><--sft><--rm><a=1><--ppo><b=2><c=3>\n"


def test_stages_run_in_the_order_of_the_line_also_in_parallel(make):
    output = make("-j", "8", "ppo", "dpo", "sft").stdout
    assert re.findall(r"recipes\.(\w+)", output) == ["ppo", "dpo", "sft"]


def test_a_glob_reaches_the_recipe_as_it_is_and_quotes_hold_words_together(make):
    (make.folder / "data.sft.path=Makefile").touch()
    output = make("sft", "ARGS=data.sft.path=M* 'x=a b' y=[1,2]").stdout
    assert output == "<-m><recipes.sft><data.sft.path=M*><x=a b><y=[1,2]>\n"


def test_a_failing_stage_stops_the_line(make):
    (make.folder / ".venv" / "bin" / "python").write_text('#!/bin/sh\necho "$2"; [ "$2" != recipes.rm ]\n')
    done = make("sft", "rm", "ppo")
    assert done.returncode != 0 and done.stdout.splitlines() == ["recipes.sft", "recipes.rm"]


def test_an_old_python_is_refused_with_what_to_type(make):
    shutil.rmtree(make.folder / ".venv")
    old = make.folder / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2\n')
    old.chmod(0o755)
    done = make("sft", "rm", "PYTHON=./old")
    assert done.returncode != 0 and not (make.folder / ".venv").exists()
    assert "needs Python 3.11 or newer, and ./old is: Python 3.9.2." in done.stderr
    assert "make PYTHON=python3.12 sft rm" in done.stderr


def test_a_python_that_cannot_make_an_environment_says_what_to_install_and_virtualenv_will_do(make):
    """As Debian's without python3-venv, and Colab's."""
    shutil.rmtree(make.folder / ".venv")
    bare = make.folder / "bare"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*|*virtualenv*) exit 1;; esac\n')
    bare.chmod(0o755)
    done = make("sft", "rm", "PYTHON=./bare")
    assert done.returncode != 0 and not (make.folder / ".venv").exists()
    assert "ensurepip is missing" in done.stderr and "apt install python3-venv" in done.stderr
    assert "./bare -m pip install virtualenv" in done.stderr and "make sft rm" in done.stderr
    bare.write_text(
        FAKE_PYTHON.replace("-m venv", "-m virtualenv").replace(
            "case", 'case "$2" in *ensurepip*) exit 1;; esac\ncase', 1
        )
    )
    assert "recipes.sft" in make("sft", "PYTHON=./bare").stdout + (make.folder / "log").read_text()


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> log
case "$1 $2" in
  "-m venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python;;
  "-m pip") [ ! -e break ];;
esac
"""


def test_a_set_up_that_was_broken_off_is_made_again_and_a_whole_one_is_kept(make):
    shutil.rmtree(make.folder / ".venv")
    (make.folder / "fake").write_text(FAKE_PYTHON)
    (make.folder / "fake").chmod(0o755)
    (make.folder / "break").touch()  # pip fails
    log = make.folder / "log"

    def steps(*targets):
        log.write_text("")
        make(*targets, "PYTHON=./fake")
        return [
            re.sub(r"^-m (venv|pip|recipes.\w+).*", r"\1", line)
            for line in log.read_text().splitlines()
            if line[:2] == "-m"
        ]

    assert steps("sft") == ["venv", "pip"]
    assert steps("sft") == ["venv", "pip"]  # not used half finished
    (make.folder / "break").unlink()
    assert steps("sft", "rm") == ["venv", "pip", "recipes.sft", "recipes.rm"]
    assert steps("sft") == ["recipes.sft"]
    subprocess.run(["touch", "-d", "+1 minute", make.folder / "constraints.txt"], check=True)
    assert steps("sft") == ["pip", "recipes.sft"]  # other versions: brought up to date in place


def test_only_the_tests_set_up_what_they_need_beside(make):
    (make.folder / ".venv" / ".dev").unlink()
    pip = "<-m><pip><install><--quiet><--disable-pip-version-check><-c><constraints.txt><-e><.[dev]>"
    tests = "<-m><pytest><-n><auto><--maxprocesses><4><--dist><loadfile><--no-loadscope-reorder>"
    assert "<pip>" not in make("sft", "eval", "report").stdout
    assert make("test").stdout.splitlines()[1:] == [pip, tests]
    assert make("test").stdout.splitlines() == [tests]


def test_every_pinned_version_is_in_the_ranges_of_pyproject():
    from packaging.requirements import Requirement

    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and line[0] != "#"
    )
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in (*project["dependencies"], *(text for extra in extras.values() for text in extra)):
        requirement = Requirement(text)
        if requirement.name == project["name"]:  # one extra takes in others
            continue
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text
    assert pins["torch"] == "2.13.0"  # with no local part: the CPU build here, the CUDA build on a GPU machine
    assert not re.search(r"https?://|--", (ROOT / "constraints.txt").read_text())
