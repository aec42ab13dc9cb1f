"""What the documents say can be typed: every command composes, every option and file that is named exists."""

import ast
import contextlib
import importlib
import inspect
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from rlhf_recipes.config import CONF, compose
from rlhf_recipes.config.command import _checked
from rlhf_recipes.config.options import GROUPS, RECIPES, TRAINING, options
from rlhf_recipes.plan.command import parse

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SOURCES = sorted([*(ROOT / "recipes").glob("*.py"), *(ROOT / "rlhf_recipes").glob("*.py"), *CONF.rglob("*.yaml")])
TARGETS = set(re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.M)[1].split())
COMMAND = re.compile(r"^\s*(?:#\s*)?((?:make|python -m recipes\.\w+) .*)$")
VARIABLES = {"ARGS": {*RECIPES, "report"}, "CARD": {"plan"}, "BETAS": {"overoptimization"}} | {
    f"{recipe.upper()}_ARGS": {recipe} for recipe in RECIPES
}


def told(file):
    """The commands of a document or of a source's docstring and comments."""
    text = file.read_text()
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    found = [match[1] for line in text.splitlines() if (match := COMMAND.match(line))]
    return [c for c in found if c.split()[0] == "python" or set(c.split()[1].split()) <= TARGETS]


COMMANDS = [(file, command) for file in (*DOCUMENTS, *SOURCES) for command in told(file)]


def recipes_of(command):
    """What a command runs: recipe and arguments, as make's recipe lines and the shell take them apart."""
    words = shlex.split(command, comments=True)
    if words[:3] == ["python", "-m", "recipes.plan"]:
        asked = parse(words[3:], "")
        return [(recipe, asked.overrides(recipe)) for recipe in TRAINING]
    if words[:3] == ["python", "-m", "recipes.report"]:
        return [("sft", words[3:])]  # it takes what a recipe takes
    if words[0] == "python":
        return [(words[2].removeprefix("recipes."), words[3:])]
    variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    targets = [word for word in words[1:] if "=" not in word]
    assert targets and set(targets) <= TARGETS, command
    if "plan" in targets:  # it looks at every stage
        targets += TRAINING
    if "overoptimization" in targets:
        targets += ["sft", "rm", "ppo"]
    if targets == ["report"]:  # it takes what a recipe takes
        return [("sft", shlex.split(variables.get("ARGS", "")))]
    assert variables.keys() <= VARIABLES.keys(), command
    for name in variables:
        assert VARIABLES[name] & {*targets}, f"{name} reaches no target of the line: {command}"
    return [
        (target, shlex.split(" ".join(text for name, text in variables.items() if target in VARIABLES[name])))
        for target in targets
        if target in RECIPES
    ]


def test_there_are_commands_in_the_readme_and_in_every_recipe():
    files = {file for file, _ in COMMANDS}
    assert {ROOT / "README.md", *(ROOT / "recipes" / f"{recipe}.py" for recipe in RECIPES)} <= files
    readme = "\n".join(command for file, command in COMMANDS if file.name == "README.md")
    assert "make sft rm ppo " in readme and "make test" in readme


@pytest.mark.parametrize(("file", "command"), COMMANDS, ids=[f"{f.name}: {c}" for f, c in COMMANDS])
def test_a_command_composes(file, command):
    for recipe, arguments in recipes_of(command):
        flags = [argument for argument in arguments if argument.startswith("-")]
        overrides = [argument for argument in arguments if "=" in argument and not argument.startswith("-")]
        assert {*flags} <= {"-m", "--help", "--options", "--cfg"}, command
        if {"--help", "--options", "--cfg"} & {*flags}:
            assert len(printed(recipe, arguments)) > 100
        elif "-m" in flags:
            _checked(recipe, overrides, multirun=True)
        else:
            assert overrides == arguments, command
            compose(recipe, overrides)


def printed(recipe, arguments):
    written = io.StringIO()
    argv, sys.argv = sys.argv, ["recipe", *arguments]
    try:
        with contextlib.redirect_stdout(written):
            importlib.import_module(f"recipes.{recipe}").main()
    finally:
        sys.argv = argv
    return written.getvalue()


def test_help_shows_the_recipes_own_commands():
    for recipe in RECIPES:
        text = printed(recipe, ["--help"])
        assert all(command in text for file, command in COMMANDS if file == ROOT / "recipes" / f"{recipe}.py")


ENVIRONMENT = ("OMP_NUM_THREADS", "PYTHON", "PYTORCH_ALLOC_CONF", "CUDA_VISIBLE_DEVICES")
KNOWN = {key for recipe in RECIPES for key in options(recipe)} | {*GROUPS}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_every_option_that_a_document_names_exists(file):
    code = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", file.read_text(), flags=re.S))
    words = [word for text in code for word in text.split()]
    sections = {key.split(".")[0] for key in KNOWN if "." in key}
    dotted = [m[1] for word in words if (m := re.match(r"(\w+\.\w+)", word)) and word.split(".")[0] in sections]
    assert [key for key in dotted if key not in KNOWN] == []
    assigned = {m[1] for word in words if (m := re.match(r"(\w+)=", word))}
    leaves = {key.rpartition(".")[2] for key in KNOWN}
    assert assigned - KNOWN - leaves - VARIABLES.keys() - {*ENVIRONMENT} == set()


def test_the_knobs_of_ppo_are_fields_of_its_config():
    text = (ROOT / "docs" / "ppo.md").read_text().partition("## The knobs")[2].partition("\n## ")[0]
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(names) >= 8
    assert [name for name in names if f"training.{name}" not in options("ppo")] == []


@pytest.mark.parametrize("group", ["data", "quantization", "hardware", "reward"])
def test_the_table_of_groups_lists_every_choice(group):
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{group}`"))
    assert set(re.findall(r"`([\w.-]+)`", row.split("|")[2])) == {file.stem for file in (CONF / group).glob("*.yaml")}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_within_the_repository_lead_somewhere(file):
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", file.read_text()) if "://" not in link]
    assert [link for link in links if link and not (file.parent / link).exists()] == []


def test_the_tree_in_the_readme_names_what_is_there():
    text = (ROOT / "README.md").read_text().partition("## How it is made")[2]
    files = re.findall(r"\b(\w+\.py)\b", text)
    assert len(files) > 10
    there = [{path.name for path in (ROOT / folder).rglob("*.py")} for folder in ("recipes", "rlhf_recipes")]
    missing = [f for f in files if not any(f in names for names in there)]
    assert missing == []
    folders = re.findall(r"^ {4,6}(\w+/)", text, re.M)
    assert [f for f in folders if not (ROOT / f).exists() and not (ROOT / "rlhf_recipes" / f).exists()] == []


def test_the_example_in_python_runs_as_it_stands(monkeypatch, tmp_path):
    """But for the trainer itself, whose place is taken by something that checks the call."""
    import rlhf_recipes

    calls = []

    class Trainer:
        def __init__(self, **kwargs):
            calls.append(inspect.signature(real.__init__).bind(self, **kwargs).arguments)

        def train(self):
            calls.append("train")

    real = rlhf_recipes.PPOTrainer
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    monkeypatch.setattr(rlhf_recipes, "PPOTrainer", Trainer)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"my_reward": print, "prompts": None, "heldout_prompts": None})
    assert len(calls) == 2 and calls[1] == "train"
    assert calls[0]["args"].beta == 0.05
