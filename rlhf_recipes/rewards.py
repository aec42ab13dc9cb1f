"""Where PPO's reward comes from: a reward model, Python functions, an HTTP endpoint, or a weighted mix of them."""

import importlib
import importlib.util
import json
import math
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from rlhf_recipes.errors import UserError

RewardFunction = Callable[..., list[float | None]]
"""TRL's signature: `f(prompts, completions, completion_ids, **columns_of_the_dataset) -> one score per completion`."""

EXAMPLE = """def brevity(completions, **kwargs):
    return [-len(completion) / 100 for completion in completions]"""
RETRIES, FIRST_WAIT, TIMEOUT = 3, 1.0, 60.0  # of an endpoint; seconds


@dataclass
class Rewards:
    """What `PPOTrainer` takes: the adapter first, then models and functions, with one weight for each."""

    adapter: Path | None = None
    functions: list[Any] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)


def from_config(cfg: DictConfig, run_model: Path | None) -> Rewards:
    """The rewards that the `reward` section asks for.

    Args:
        run_model: folder of the run's own reward model.

    Raises:
        UserError: a function or file that is not there, not as many weights as sources, or a reward model at chance;
            all faults in one message.
    """
    rewards, faults, weights = Rewards(), [], []
    if cfg.model == "run":
        rewards.adapter = run_model
        if run_model is not None and (fault := at_chance(run_model, cfg.min_accuracy)):
            faults.append(fault)
    elif cfg.model is not None and (Path(cfg.model) / "adapter_config.json").exists():
        rewards.adapter = Path(cfg.model)
    elif cfg.model is not None:
        rewards.functions.append(cfg.model)  # a sequence classifier, which TRL loads
    weights += [1.0] * (cfg.model is not None)
    for item in cfg.functions or []:
        entry = {"path": item} if isinstance(item, str) else dict(item)
        weight: Any = entry.get("weight", 1.0)
        weights.append(weight)
        if "path" not in entry or entry.keys() - {"path", "weight"} or not isinstance(weight, int | float):
            faults.append(
                f"reward.functions: {entry}: want {{path: <module:function or file.py:function>, weight: 1.0}}"
            )
            continue
        try:
            rewards.functions.append(function(str(entry["path"])))
        except UserError as error:
            faults.append(str(error))
    if cfg.url is not None:
        if not cfg.url.startswith(("http://", "https://")):
            faults.append(f"reward.url={cfg.url}: want an address that begins with http:// or https://")
        rewards.functions.append(endpoint(cfg.url))
        weights.append(1.0)
    rewards.weights = weights if cfg.weights is None else [float(weight) for weight in cfg.weights]
    if len(rewards.weights) != len(weights):
        faults.append(f"reward.weights has {len(rewards.weights)} numbers for {len(weights)} sources of reward")
    if faults:
        raise UserError("\n".join(faults))
    return rewards


def at_chance(folder: Path, least: float) -> str | None:
    """What is wrong with a reward model that does not tell its raters' choice from the other answer; None if it does.

    Args:
        folder: of the stage that made it, with its `metrics.json`.
        least: accuracy that has to lie below the 95% interval of the model's; 0 asks for nothing.
    """
    metrics = json.loads((folder / "metrics.json").read_text())
    accuracy, half_width = metrics["accuracy"]
    surely = accuracy - (math.inf if half_width is None else half_width)  # a single pair proves nothing
    if least <= 0 or surely > least:
        return None
    return (
        f"the reward model in {folder} agrees with its raters on {accuracy:.3f} ± {half_width or math.nan:.3f} of "
        f"{metrics['pairs']:,} held-out pairs, not surely above {least:g}: PPO would learn its noise. Train it on more "
        "pairs or for longer (make rm ... overwrite=true), or insist by reward.min_accuracy=0."
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
                        f"the reward endpoint {url} failed {attempts} times: {error}{said}. Nothing is lost: run the "
                        "command again to resume from the last checkpoint."
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
    raise UserError(
        f'the reward endpoint {url} answered {seen}; want {{"rewards": [...]}} with {wanted} numbers or nulls'
    )
