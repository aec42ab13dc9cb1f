"""A model asked which of two answers is better: with positions swapped, over HTTP or in this process.

Each question is put twice, with either answer first, and where the two replies disagree it is a tie: a judge that likes
what stands first decides nothing. Replies are kept as they come, by what was asked, so that a comparison that was
broken off asks only the rest, and a changed answer is asked about anew.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from textwrap import shorten
from typing import IO, Any, NamedTuple, cast

from omegaconf import DictConfig

from rlhf_recipes import terminal
from rlhf_recipes.comparison.replies import Reply, read_reply
from rlhf_recipes.errors import UserError
from rlhf_recipes.rewards import shown_url
from rlhf_recipes.runs import disk

logger = logging.getLogger(__name__)

QUESTION = """Here are a prompt and two answers to it.

[Prompt]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

{question} Reply with one letter: A, B, or T for a tie."""
GIVE_UP = 20
"""Questions in a row that got no usable reply, after which the judge is taken to be gone."""
FIRST_WAIT = 1.0  # seconds before a further try, doubled each time


class Question(NamedTuple):
    """What a judge is asked."""

    prompt: str
    first: str
    second: str

    def text(self, question: str) -> str:
        """As the judge reads it."""
        return QUESTION.format(prompt=self.prompt, first=self.first, second=self.second, question=question)


Ask = Callable[[Sequence[Question]], Iterator[tuple[int, Reply | None, str]]]
"""Puts questions and gives, in any order, the number of each with its reply, None where none could be had, and what
came last: the judge's words, or the error."""


class Asked:
    """A judge that is asked.

    Args:
        name: to show.
        about: what replies depend on beside the question itself, such as the judge's model.
        ask: puts the questions.
        folder: where replies are kept.
        mark: what identifies it as a reward.
    """

    def __init__(self, name: str, about: dict[str, Any], ask: Ask, folder: Path, mark: str):
        self.name, self.about, self._ask, self.mark = name, about, ask, mark
        self.file = folder / f"{re.sub(r'[^-.a-zA-Z0-9]', '_', name)}.jsonl"

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str], baselines: Sequence[str]) -> list[float | None]:
        """For each pair 1 if the answer wins, 0 if the baseline's does, 0.5 for a tie; None where the judge failed."""
        rows = list(zip(prompts, answers, baselines, strict=True))
        unlike = [row for row in dict.fromkeys(rows) if row[1].strip() != row[2].strip()]  # equals need no judge
        wanted = [Question(p, *order) for p, a, b in unlike for order in ((a, b), (b, a))]
        replies = self._replies(wanted)
        return [_verdict(replies, *row) for row in rows]

    def _replies(self, wanted: Sequence[Question]) -> dict[Question, Reply]:
        """The reply to each question, of before or of now; those without one are left out."""
        kept = self._read()
        by_id = {self._id(question): question for question in wanted}
        missing = [question for name, question in by_id.items() if name not in kept]
        if missing:
            self._put(missing, kept)
        return {question: kept[name] for name, question in by_id.items() if name in kept}

    def _put(self, questions: Sequence[Question], kept: dict[str, Reply]) -> None:
        terminal.say(f"{self.name}: asked {len(questions):,} questions ...")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        failed = 0
        with self.file.open("a") as file:
            for number, reply, said in self._ask(questions):
                failed = failed + 1 if reply is None else 0
                if reply is not None:
                    name = self._id(questions[number])
                    kept[name] = reply
                    _append(file, {"id": name, "reply": reply})
                if failed >= GIVE_UP:
                    raise UserError(
                        f"{self.name} gave no usable reply to {failed} questions in a row. The {len(kept):,} replies "
                        f"before are kept in {self.file}: see to the judge, and run the same command again. What came "
                        f"last: {shorten(said, 300, placeholder=' ...')!r}"
                    )

    def _read(self) -> dict[str, Reply]:
        if not self.file.exists():
            return {}
        kept = {}
        for line in self.file.read_text().splitlines():
            try:
                row = json.loads(line)
                kept[str(row["id"])] = cast(Reply, row["reply"])
            except (ValueError, KeyError, TypeError):
                continue  # the line that was being written when the process was killed
        return kept

    def _id(self, question: Question) -> str:
        return disk.hash_value([self.about, *question])


def _append(file: IO[str], row: dict[str, Any]) -> None:
    file.write(json.dumps(row) + "\n")
    file.flush()


def _verdict(replies: dict[Question, Reply], prompt: str, answer: str, baseline: str) -> float | None:
    if answer.strip() == baseline.strip():
        return 0.5
    as_first = replies.get(Question(prompt, answer, baseline))
    as_second = replies.get(Question(prompt, baseline, answer))
    if as_first is None or as_second is None:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get((as_first, as_second), 0.5)


# ---- over HTTP


def endpoint(cfg: DictConfig, folder: Path) -> Asked:
    """The judge behind an OpenAI-compatible endpoint, which is asked for its models first.

    Raises:
        UserError: no such server, no right to use it, or no such model there.
    """
    openai = _openai()
    client = openai.OpenAI(
        base_url=cfg.url,
        api_key=os.environ.get(cfg.key_variable) or "none",  # local servers want none, and the client wants one
        timeout=cfg.timeout,
        max_retries=0,
    )
    url = shown_url(cfg.url)
    _check(openai, client, cfg, url)

    def put(question: Question) -> tuple[Reply | None, str]:
        said = ""
        for attempt in range(cfg.retries + 1):
            if attempt:
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                answer = client.chat.completions.create(
                    model=cfg.model,
                    messages=[{"role": "user", "content": question.text(cfg.question)}],
                    temperature=0.0,
                )
                said = answer.choices[0].message.content or ""
                reply = read_reply(said)
                if reply is not None:
                    return reply, said
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise UserError(
                    f"the judge at {url} refuses: {error}. Its key is read from {cfg.key_variable}."
                ) from error
            except (openai.OpenAIError, IndexError, AttributeError, ValueError) as error:
                said = f"{type(error).__name__}: {error}"
            logger.info("%s: no verdict in %r", url, said)
        return None, said

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Reply | None, str]]:
        stop = threading.Event()
        with ThreadPoolExecutor(cfg.concurrency) as pool:
            futures = {
                pool.submit(lambda q: (None, "") if stop.is_set() else put(q), question): number
                for number, question in enumerate(questions)
            }
            try:
                for future in as_completed(futures):
                    yield futures[future], *future.result()
            finally:
                stop.set()  # who gave up, or was interrupted, does not wait for the rest
                pool.shutdown(wait=False, cancel_futures=True)

    about = {"url": url, "model": cfg.model, "question": cfg.question}
    return Asked(f"{cfg.model} at {url}", about, ask, folder, url)


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise UserError("judge.url needs the openai package: .venv/bin/pip install openai") from error
    return openai


def _check(openai: Any, client: Any, cfg: DictConfig, url: str) -> None:
    try:
        models = [model.id for model in client.models.list()]
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        key = "is set" if os.environ.get(cfg.key_variable) else "is not set"
        raise UserError(
            f"the judge at {url} refuses: {error}. The environment variable {cfg.key_variable} {key}."
        ) from error
    except openai.APIConnectionError as error:
        raise UserError(
            f"no judge answers at {url}: {error.__cause__ or error}. Start it, or set another judge.url."
        ) from error
    except openai.OpenAIError:
        return  # not every server lists its models
    if models and cfg.model not in models:
        raise UserError(f"judge.model={cfg.model}: {url} has no such model; it has {', '.join(sorted(models)[:20])}")


# ---- in this process


def local(cfg: DictConfig, folder: Path) -> Asked:
    """A causal language model as judge, loaded like the run's base (dtype, quantization) when it is first asked.

    It is read and not sampled: the likelier of the letters A and B after the question is its reply.
    """
    from rlhf_recipes import models

    judge, own = cfg.judge, models.with_model(cfg, cfg.judge.model)

    def ask(questions: Sequence[Question]) -> Iterator[tuple[int, Reply | None, str]]:
        import torch
        from datasets import Dataset

        from rlhf_recipes.data.formats import render_prompt
        from rlhf_recipes.evaluation.sampling import by_batches
        from rlhf_recipes.roles import Episodes

        rows = [{"prompt": [{"role": "user", "content": q.text(judge.question)}]} for q in questions]
        tokenizer = models.load_tokenizer(own.model, Dataset.from_list(rows[:1]))
        model = models.load_base(own).eval()
        letters = [
            sorted({tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in (letter, f" {letter}")})
            for letter in "AB"
        ]

        @torch.no_grad()
        def read(batch: Sequence[list[int]]) -> list[Reply]:
            padded = Episodes.padded(list(batch), [[]] * len(batch), tokenizer.pad_token_id, model.device)
            logits = (
                model(
                    input_ids=padded.input_ids, attention_mask=padded.attention_mask, logits_to_keep=1, use_cache=False
                )
                .logits[:, -1]
                .float()
            )
            first, second = (logits[:, ids].logsumexp(dim=-1) for ids in letters)
            return ["A" if better else "B" for better in (first > second).tolist()]

        encoded = [render_prompt(row, tokenizer) for row in rows]
        size = cfg.evaluation.batch_size
        for start in range(0, len(encoded), size):  # by batches, so that each is kept as soon as it is there
            for number, reply in enumerate(by_batches(encoded[start : start + size], size, read), start):
                yield number, reply, reply

    about = {"weights": models.weights_mark(own.model), "dtype": own.model.dtype, "question": judge.question}
    about["quantization"] = str(dict(cfg.quantization))
    return Asked(str(judge.model), about, ask, folder, str(judge.model))
