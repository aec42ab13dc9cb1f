"""From the command line to a checked, typed config, and from a node of it to an object of a config class."""

import contextlib
import difflib
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf_recipes import data, machine, terminal
from rlhf_recipes.allocator import grow_segments
from rlhf_recipes.call_stack import roomy
from rlhf_recipes.config import options, ranges, refusals, schema
from rlhf_recipes.errors import UserError

CONF = Path(__file__).parents[2] / "conf"
VERSION_BASE = "1.3"  # of Hydra: its defaults stay those of this version

T = TypeVar("T")


def build(cls: type[T], node: DictConfig, **defaults: Any) -> T:
    """An object of a config class from what was set in its node; `defaults` hold for keys that nobody set.

    Raises:
        UserError: if the class refuses a value, or has no such option (some classes ignore that in silence).
    """
    values = defaults | plain(node)
    known = schema.options(f"{cls.__module__}.{cls.__qualname__}")
    strange = [key for key in values if key not in known]
    if strange:
        raise UserError(f"{cls.__name__} has no option {', '.join(strange)}")
    try:
        return cls(**values)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise UserError(f"{cls.__name__} refuses its options: {error}") from error


def plain(node: DictConfig) -> dict[str, Any]:
    """A node as plain Python values: of a library's options those that somebody set, of the project's own all."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))


def compose(recipe: str, overrides: Sequence[str] = ()) -> DictConfig:
    """The config of a recipe under `key=value` overrides, as a typed node.

    Raises:
        UserError: with all faults in one message, each with the nearest valid name.
    """
    return _node(recipe, _checked(recipe, overrides, multirun=False)[1])


def recipe(name: str) -> Callable[[Callable[[DictConfig], object]], Callable[[], None]]:
    """Makes `main(cfg)` a command with `key=value` overrides, `-m` sweeps, `--cfg job`, `--help`, `--options [word]`.

    A `UserError` ends as its plain message on stderr, with exit code 2.
    """

    def decorate(main: Callable[[DictConfig], object]) -> Callable[[], None]:
        @functools.wraps(main)
        def command() -> None:
            with plain_errors():
                _command(name, main, sys.argv[1:])

        return command

    return decorate


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A `UserError` ends the program as its plain message on stderr, with exit code 2."""
    try:
        yield
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; the same command goes on from the newest checkpoint\n")
        sys.exit(130)


def _command(name: str, main: Callable[[DictConfig], object], argv: list[str]) -> None:
    """Check the whole command line first, then hand over to Hydra."""
    parser = get_args_parser()
    parser.add_argument("--options", nargs="?", const="", metavar="WORD")
    args, strange = parser.parse_known_intermixed_args(argv)
    if args.options is not None:
        sys.stdout.write(options.reference(name, args.options))
        return
    typed = [*args.overrides, *strange]
    overrides, values = _checked(name, typed, multirun=args.multirun)
    if args.help:
        groups = {group: _choices(group) for group in options.groups(name)}
        sys.stdout.write(options.overview(name, sys.modules[main.__module__].__doc__ or "", values, groups))
        return

    def job(composed: DictConfig) -> None:
        terminal.quiet()
        with plain_errors():
            checked, _ = _examined(name, composed)
            grow_segments()
            hardware = HydraConfig.get().runtime.choices.get("hardware")
            with machine.chosen(hardware, use_cpu=bool(checked.get("training.use_cpu"))) as line, refusals.told(typed):
                terminal.say(line or "")
                roomy(main)(_node(name, checked))

    flags = [argument for argument in argv if argument not in typed]
    sys.argv = [sys.argv[0], *flags, *overrides]
    hydra.main(config_path=str(CONF), config_name=name, version_base=VERSION_BASE)(job)()


def _checked(recipe: str, overrides: Sequence[str], *, multirun: bool) -> tuple[list[str], dict[str, Any]]:
    """The overrides as Hydra is to see them, and the values of the (first) job by full key."""
    accepted, faults = _rewritten(recipe, overrides, multirun=multirun)
    first: dict[str, Any] = {}
    with hydra.initialize_config_dir(str(CONF), version_base=VERSION_BASE):
        for job in itertools.product(*accepted.values()):
            try:
                values, found = _examined(recipe, hydra.compose(recipe, list(job)))
            except HydraException as error:
                values, found = {}, [" ".join(f"{error} {error.__cause__ or ''}".split())]
            first = first or values
            found += _without_effect(recipe, values, [o.lstrip("+").partition("=")[0] for o in overrides])
            faults += [fault for fault in found if fault not in faults]
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(
            f"{count} in the config of {recipe}; nothing was started.\n"
            + "".join(f"  {fault}\n" for fault in faults)
            + f"All options: python -m recipes.{recipe} --options [word]"
        )
    return list(accepted), first


def _rewritten(recipe: str, overrides: Sequence[str], *, multirun: bool) -> tuple[dict[str, list[str]], list[str]]:
    """Each override as Hydra is to see it with its alternatives in a sweep, and the faults of those that cannot be.

    Hydra wants `++` before a key that conf/ does not hold, and advises it for every typo. Here each key gets its `++`,
    and the schema decides afterwards what is a key.
    """
    accepted: dict[str, list[str]] = {}
    faults = []
    for text in map(_quoted, overrides):
        if text.startswith("--"):
            faults.append(f"{text}: no such flag; options have no dashes: key=value")
            continue
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            reason = str(error).partition("\n")[0]
            faults.append(f"{text}: not of the form key=value ({reason}); a value with special characters wants quotes")
            continue
        key, choices = override.key_or_group, _choices(override.key_or_group)
        swept = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
        if swept and not multirun:
            faults.append(f"{text}: more than one value; add -m to try each, or brackets to mean a list: {key}=[...]")
        elif key in options.GROUPS and key not in options.groups(recipe):
            faults.append(f"{text}: {options.belongs(key, options.ONLY[key], recipe)}")
        elif choices and not isinstance(override.value(), dict):
            chosen = swept or [str(override.value())] if override.value() else []
            wrong = [f"{key}={choice}: {_no_choice(key, choice)}" for choice in chosen if choice not in choices]
            if not wrong:
                accepted[text] = [f"{override.get_key_element()}={choice}" for choice in swept] or [text]
            faults += wrong
        elif override.is_delete() or override.is_hydra_override():
            accepted[text] = [text]
        else:
            preset = any(other.startswith("model=") for other in overrides)
            if key == "model.name_or_path" and override.value() != "embedded" and not preset:
                accepted["model=other"] = ["model=other"]  # the settings of the default model are not for this one
            if isinstance(override.value(), list) and key.startswith("data."):
                accepted[f"~{key}"] = [f"~{key}"]  # a mixture takes the place of the preset's one source
            text = f"++{text.lstrip('+')}"
            accepted.pop(text, None)  # the last word on a key counts, also where it repeats the first
            accepted[text] = [f"++{key}={value}" for value in swept] or [text]
    return accepted, faults


def _quoted(text: str) -> str:
    """An override whose values with an equals sign, such as folders of sweeps, are in the quotes that Hydra wants."""
    key, sign, value = text.partition("=")
    return key + sign + re.sub(r"(^|[\[,])([^\[\]{},'\"]*=[^\[\]{},'\"]*)(?=$|[\],])", r"\1'\2'", value)


def _choices(group: str) -> list[str]:
    """The files of a config group, none if there is no such group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _no_choice(group: str, choice: str) -> str:
    near = difflib.get_close_matches(choice, _choices(group), n=1, cutoff=0.5)
    mean = f"; did you mean {group}={near[0]}?" if near else "."
    own = {
        "model": " For a hub id or a folder: model.name_or_path=...",
        "data": " For data of your own: data=files data.sft.path=...",
        "rollouts": " vLLM cannot be installed beside the tested versions: docs/ppo.md.",
    }
    return f"no such choice{mean} There are {', '.join(_choices(group))}.{own.get(group, '')}"


def _examined(recipe: str, composed: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """The values that a composed config sets, by full key, and everything that is wrong with it."""
    try:
        tree = plain(composed)
    except OmegaConfBaseException as error:
        return {}, [str(error).partition("\n")[0]]
    flat: dict[str, Any] = {}
    faults = []
    for key, value in tree.items():
        if isinstance(value, dict):  # a section, or one misspelt
            flat |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif key not in options.sections(recipe):
            flat[key] = value
        else:
            faults.append(f"{key}={value}: a section; set its options, as {key}.<option>=<value>")
    known = options.options(recipe)
    values = {}
    for key, value in (dict.fromkeys(options.required(recipe), MISSING) | flat).items():
        if key in options.DECIDED and key in known:
            faults.append(f"{key}: not to be set; {options.DECIDED[key]}")
        elif key not in known:
            faults.append(f"{key}={value}: {options.unknown(recipe, key)}")
        elif value == MISSING:
            faults.append(f"{key}: no value; set {key}=<{known[key].annotation}>")
        else:
            try:
                values[key] = known[key].accept(value)
            except ValueError as error:
                faults.append(f"{key}={value}: {error}")
            else:
                wrong = ranges.fault(key, value)
                faults += [f"{key}={value}: {wrong}"] if wrong else []
    faults += _data_faults(recipe, {key: value for key, value in values.items() if key.startswith("data.")})
    return values, faults + options.conflicts(values)


def _without_effect(recipe: str, values: dict[str, Any], typed: Sequence[str]) -> list[str]:
    """Options that somebody typed and that would do nothing, each with what to type."""
    found = []
    epochs, steps = "training.num_train_epochs", values.get("training.max_steps", -1)
    if epochs in typed and recipe in options.TRAINING and steps > 0:
        found.append(
            f"{epochs}={values.get(epochs)}: no effect while training.max_steps={steps} decides (a preset may have set "
            "it); add training.max_steps=-1"
        )
    if "lora.modules_to_save" in typed and recipe == "rm":
        found.append(
            "lora.modules_to_save: no effect in a reward model, whose one module trained in full is its scalar head; "
            "leave it out"
        )
    return found


def _data_faults(recipe: str, values: dict[str, Any]) -> list[str]:
    """What is wrong with the sources of this recipe, and with those of others: the same ARGS will reach them later."""
    sources = {key.removeprefix("data."): value for key, value in values.items()}
    faults: list[str] = []
    for stage in data.STAGES:
        source = sources.get(stage)
        given = source.get("path") if isinstance(source, dict) else source
        if given or stage == options.READS.get(recipe):
            try:
                data.parse(sources, stage)
            except UserError as error:
                faults += [fault for fault in str(error).splitlines() if fault not in faults]
    return faults


def _node(recipe: str, values: dict[str, Any]) -> DictConfig:
    """The typed config that a recipe gets."""
    cfg: dict[str, Any] = {}
    for section, fields in options.sections(recipe).items():
        prefix = f"{section}." if section else ""
        mine = {name: values[prefix + name] for name in fields if prefix + name in values}
        node = schema.node(fields, mine, defaults=options.ours(section))
        cfg |= {section: node} if section else dict(node)
    config = OmegaConf.create(cfg)
    OmegaConf.set_struct(config, True)
    return config
