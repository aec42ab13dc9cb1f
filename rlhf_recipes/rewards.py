"""Where PPO's reward comes from: a reward model, Python functions, an HTTP endpoint, or a weighted mix of them."""

import asyncio
import contextlib
import functools
import glob
import importlib
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import sys
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from rlhf_recipes.errors import UserError
from rlhf_recipes.runs import disk

if TYPE_CHECKING:
    from rlhf_recipes.evaluation import Sample

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., list[float | None]]
"""TRL's signature: `f(prompts, completions, completion_ids, **columns_of_the_dataset) -> one score per completion`."""

RUN = "run"
"""The run's own reward model, where a folder is asked for."""
ADAPTER_CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EXAMPLE = """def brevity(completions, **kwargs):
    return [-len(completion) / 100 for completion in completions]"""
SECRET = re.compile(r"key|token|secret|pass|pwd|auth|sig|sas|code|credential", re.IGNORECASE)
"""Names in the query of an address whose values are not shown."""
RESUME = (
    "Nothing that was saved is lost: run the command again to resume from the last checkpoint (in a script: "
    "trainer.train(resume_from_checkpoint=True))"
)
RETRIES, FIRST_WAIT, TIMEOUT = 3, 1.0, 60.0  # of an endpoint; seconds


@dataclass
class Rewards:
    """What `PPOTrainer` takes: the adapters first, as one, then models and functions, with one weight for each."""

    adapters: list[Path] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the sources, as `weights`


@dataclass(frozen=True)
class Source:
    """One source of a section: a reward model or an ensemble of them, a function, or an endpoint."""

    key: str  # of the section that names it: `model`, `functions` or `url`
    name: str  # as tables call it
    marks: dict[str, str]  # what identifies it, or each member of an ensemble, with how the section calls that
    weight: float
    section: dict[str, Any]  # one that asks for nothing else


def from_config(cfg: DictConfig, run_model: Path | None, section: str = "reward") -> Rewards:
    """The rewards that a section asks for.

    Args:
        run_model: folder of the run's own reward model.
        section: the name of `cfg`, for messages.

    Raises:
        UserError: a function or file that is not there, not as many weights as sources, or a reward model that is no
            adapter, stands twice in an ensemble, or is at chance; all faults in one message.
    """
    rewards, faults, weights = Rewards(), [], []
    models = named_models(cfg.model)
    for model in models:
        folder = run_model if model == RUN else Path(model)
        if folder is not None and (model == RUN or (folder / ADAPTER_CONFIG).exists()):
            rewards.adapters.append(folder)
        elif len(models) > 1:
            faults.append(
                f"{section}.model: {model} is no reward adapter on this base (no {ADAPTER_CONFIG} in such a folder). "
                "Of several models each is one more adapter; a classifier of its own is a second base in memory: use "
                "it alone. Adapters come of other seeds: python -m recipes.rm -m run=<run> seed=1,2"
            )
        elif model != RUN:
            rewards.functions.append(model)  # a sequence classifier, which TRL loads
    if len(set(map(Path.resolve, rewards.adapters))) < len(rewards.adapters):
        faults.append(f"{section}.model: a reward model stands there twice, and would agree with itself; name it once")
    faults += [fault for path in rewards.adapters if (fault := at_chance(path, cfg.min_accuracy, section))]
    weights += [1.0] * bool(models)
    for item in cfg.functions or []:
        entry = {"path": item} if isinstance(item, str) else dict(item)
        weight: Any = entry.get("weight", 1.0)
        weights.append(weight)
        if "path" not in entry or entry.keys() - {"path", "weight"} or not isinstance(weight, int | float):
            faults.append(
                f"{section}.functions: {entry}: want {{path: <module:function or file.py:function>, weight: 1.0}}"
            )
            continue
        try:
            rewards.functions.append(function(str(entry["path"])))
        except UserError as error:
            faults.append(str(error))
    if cfg.url is not None:
        if not cfg.url.startswith(("http://", "https://")):
            faults.append(f"{section}.url={cfg.url}: want an address that begins with http:// or https://")
        rewards.functions.append(endpoint(cfg.url))
        weights.append(1.0)
    rewards.weights = weights if cfg.weights is None else [float(weight) for weight in cfg.weights]
    if len(rewards.weights) != len(weights):
        faults.append(f"{section}.weights has {len(rewards.weights)} numbers for {len(weights)} sources of reward")
    if faults:
        raise UserError("\n".join(faults))
    rewards.names = [source.name for source in sources(cfg, run_model)]
    return rewards


def sources(section: Mapping[str, Any], run_model: Path | None) -> list[Source]:
    """The sources of a `reward` or `guard` section, read from a config or a manifest; nothing is loaded."""
    found: list[Source] = []

    def add(key: str, value: Any, name: str, marks: dict[str, str], weight: float = 1.0) -> None:
        taken = {source.name for source in found}
        name = next(n for n in (name, *marks.values(), f"{name} {len(found)}") if n not in taken)
        alone = dict.fromkeys(("model", "functions", "url", "weights")) | {"min_accuracy": 0.0, key: value}
        found.append(Source(key, name, marks, weight, alone))

    if models := named_models(section["model"]):
        folders = [run_model if name == RUN else Path(name) for name in models]
        add("model", section["model"], "reward_model", {mark(f): str(f) for f in folders if f is not None})
    for item in section["functions"] or []:
        path, weight = (item, 1.0) if isinstance(item, str) else (item["path"], item.get("weight", 1.0))
        add("functions", [path], path.rpartition(":")[2], {function_mark(path): path}, weight)
    if section["url"] is not None:
        shown = shown_url(section["url"])
        add("url", section["url"], shown, {shown: shown})
    weights = section["weights"] or [source.weight for source in found]
    return [replace(source, weight=float(weight)) for source, weight in zip(found, weights, strict=True)]


def optimized(manifest: Mapping[str, Any], run_model: Path | None) -> frozenset[str]:
    """What identifies the rewards that a stage was trained on, as its manifest says; empty for one without rewards.

    Args:
        run_model: folder of the reward model of its run.
    """
    section = manifest["config"].get("reward")
    return frozenset(mark for source in (sources(section, run_model) if section else []) for mark in source.marks)


def named_models(model: str | Sequence[str] | None) -> list[str]:
    """The reward models that `reward.model` names: `run`, folders, hub ids, and patterns such as `runs/mine/rm/*`.

    A pattern stands for the adapters whose folders it matches, in the order of their names.
    """
    found = []
    for name in [model] if isinstance(model, str) else model or ():
        matched = sorted(glob.glob(name)) if glob.has_magic(name) else []
        found += [folder for folder in matched if (Path(folder) / ADAPTER_CONFIG).exists()] or [name]
    return found


def folders(model: str | Sequence[str] | None) -> list[Path]:
    """Those of the named reward models that are adapters in a folder of their own."""
    return [Path(name) for name in named_models(model) if (Path(name) / ADAPTER_CONFIG).exists()]


def at_chance(folder: Path, least: float, section: str = "reward") -> str | None:
    """What is wrong with a reward model that does not tell its raters' choice from the other answer; None if it does.

    Args:
        folder: of the stage that made it, with its `metrics.json`.
        least: accuracy that has to lie below the 95% interval of the model's; 0 asks for nothing.
    """
    if not (folder / "metrics.json").exists():  # made elsewhere: nobody measured it
        return None
    metrics = json.loads((folder / "metrics.json").read_text())
    accuracy, half_width = metrics["accuracy"]
    surely = accuracy - (math.inf if half_width is None else half_width)  # a single pair proves nothing
    if least <= 0 or surely > least:
        return None
    return (
        f"the reward model in {folder} agrees with its raters on {accuracy:.3f} ± {half_width or math.nan:.3f} of "
        f"{metrics['pairs']:,} held-out pairs, not surely above {least:g}: PPO would learn its noise. Train it on more "
        f"pairs or for longer (make rm ... overwrite=true), or insist by {section}.min_accuracy=0."
    )


def function(path: str) -> RewardFunction:
    """The reward function that `module:function` or `file.py:function` names.

    Raises:
        UserError: no such module, file or function, or an error while it was read.
    """
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise UserError(
            f"reward function {path!r}: want module:function or file.py:function, such as rewards.py:brevity"
        )
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(place)
    except Exception as error:
        raise UserError(f"reward function {path!r}: {place} cannot be read: {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        functions = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise UserError(
            f"reward function {path!r}: {place} has no function {name}; it has {', '.join(functions) or 'none'}. "
            f"An example:\n{EXAMPLE}"
        )
    return found


def called(function: RewardFunction, made: "Sequence[Sample]") -> list[float | None]:
    """The scores of samples by a reward function, called as TRL calls it; it may be a coroutine.

    The other columns of the samples' rows are passed, too.

    Raises:
        UserError: as `checked`.
    """
    scores: Any = checked(function)(
        prompts=[s.prompt for s in made],
        completions=[
            s.completion if isinstance(s.prompt, str) else [{"role": "assistant", "content": s.completion}]
            for s in made
        ],
        completion_ids=[s.completion_ids for s in made],
        **{name: [s.columns.get(name) for s in made] for name in dict.fromkeys(n for s in made for n in s.columns)},
    )
    return list(asyncio.run(scores) if inspect.iscoroutine(scores) else scores)


def checked(function: RewardFunction) -> RewardFunction:
    """The function, whose own error or wrong answer becomes one plain message; a coroutine function stays one.

    Raises:
        UserError: when it is called, if it raises, or returns anything but one number or None for each completion.
    """
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = getattr(inner, "__name__", type(inner).__name__)
    code = getattr(inspect.unwrap(inner), "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    file = getattr(code, "co_filename", "")  # whose lines are the user's own

    @contextlib.contextmanager
    def told(arguments: dict[str, Any]) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{_place(name, arguments)}raised {_said(error, file)}. {RESUME}") from error

    def numbers(scores: Any, arguments: dict[str, Any]) -> list[float | None]:
        scores = list(scores) if hasattr(scores, "__iter__") and not isinstance(scores, str) else scores
        if wrong := _wrong(scores, arguments["completions"]):
            raise UserError(f"{_place(name, arguments)}returned {wrong}. {RESUME}")
        return [None if score is None else float(score) for score in scores]

    async def later(**arguments: Any) -> list[float | None]:
        with told(arguments):
            return numbers(await waiting(**arguments), arguments)

    def at_once(**arguments: Any) -> list[float | None]:
        with told(arguments):
            return numbers(function(**arguments), arguments)

    waiting: Any = function
    waits = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)
    wrapper: Any = later if waits else at_once
    wrapper.__name__ = name  # by which TRL logs it
    return wrapper


def _place(name: str, arguments: dict[str, Any]) -> str:
    """Which function, and at which step of a training."""
    state = arguments.get("trainer_state")
    return f"reward function `{name}` " + ("" if state is None else f"at step {state.global_step} ")


def _said(error: Exception, file: str) -> str:
    """An error with the innermost line of the function's own file that it came through."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    said = f"{type(error).__name__}: {error}"
    if lines:
        return f"{said} ({os.path.relpath(file)}:{lines[-1]})"
    if isinstance(error, TypeError):  # Python's, at the call
        return f"{said} (it is given prompts, completions, completion_ids, all columns of the data and more: **kwargs)"
    return said


def _wrong(scores: Any, completions: Sequence[Any]) -> str | None:
    """What is wrong with what a reward function returned, and what is wanted; None if nothing is."""
    want = f"want a list of {len(completions)} numbers, or None where there is no score"
    if not isinstance(scores, list):
        return f"{scores!r:.80}; {want}"
    if len(scores) != len(completions):
        return f"{len(scores)} scores for {len(completions)} completions; {want}"
    for score, completion in zip(scores, completions, strict=True):
        if score is not None and not hasattr(score, "__float__"):
            return f"{score!r:.80} for the completion {completion!r:.200}; {want}"
    return None


def mark(folder: Path) -> str:
    """What identifies a reward adapter: equal for equal weights, wherever they lie."""
    file = folder / WEIGHTS
    return disk.hash_file(file) if file.exists() else str(folder.resolve())


def function_mark(path: str) -> str:
    """What identifies a function, however its file is named: `rewards:f`, `rewards.py:f`, `./rewards.py:f` are one."""
    place, _, name = path.rpartition(":")
    file = Path(place if place.endswith(".py") else place.replace(".", "/") + ".py")
    return f"{file.resolve()}:{name}" if file.is_file() else path


def shown_url(url: str) -> str:
    """An address as it may be shown and written down: without user, password, and the secrets of its query.

    >>> shown_url("https://me:pw@host:8000/v1?version=2&api_key=sk-1")
    'https://***@host:8000/v1?version=2&api_key=***'
    """
    parts = urllib.parse.urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    query = [
        name + equals + ("***" if SECRET.search(name) else value)
        for name, equals, value in (pair.partition("=") for pair in parts.query.split("&"))
    ]
    return parts._replace(netloc=f"***@{host}" if at else host, query="&".join(query)).geturl()


def endpoint(url: str) -> RewardFunction:
    """A reward function that asks an HTTP endpoint.

    It is sent `{"prompts": [...], "completions": [...]}` and answers `{"rewards": [...]}`, one number (or null for an
    episode that is not to count) per completion. Server errors and time-outs are tried again a few times.
    """

    def http_reward(prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float | None]:
        body = json.dumps({"prompts": prompts, "completions": completions}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        attempts = 0
        while True:
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return _read_rewards(url, answer.read(), len(completions))
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                attempts += 1
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if refused or attempts > RETRIES:
                    said = ""
                    if isinstance(error, urllib.error.HTTPError):
                        said = f" ({error.read(200).decode(errors='replace')})"
                    raise UserError(
                        f"the reward endpoint {shown_url(url)} failed {attempts} times: {error}{said}. {RESUME}"
                    ) from error
            time.sleep(FIRST_WAIT * 2 ** (attempts - 1))

    return http_reward


def _read_rewards(url: str, answer: bytes, wanted: int) -> list[float | None]:
    try:
        rewards = json.loads(answer)["rewards"]
        if len(rewards) == wanted:
            return [None if reward is None else float(reward) for reward in rewards]
        seen = f"{len(rewards)} rewards"
    except (ValueError, KeyError, TypeError):
        seen = repr(answer[:200].decode(errors="replace"))
    want = f'{{"rewards": [...]}} with {wanted} numbers or nulls'
    raise UserError(f"the reward endpoint {shown_url(url)} answered {seen}; want {want}")
