"""TRL's dataset formats row by row: what a good row is, rankings as pairs, and what the model sees of a row."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Messages = list[dict[str, Any]]

STAGES = ("sft", "preferences", "prompts")
"""What a stage of training reads: SFT `sft`, the reward model and DPO `preferences`, PPO `prompts`."""

FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "sft": (("prompt", "completion"), ("messages",), ("text",)),
    "preferences": (("prompt", "responses", "ranking"), ("chosen", "rejected")),
    "prompts": (("chosen", "rejected"), ("prompt",), ("messages",)),
}
"""The columns a row may have, for each stage; the first set that is complete decides how the row is read."""

ANSWERS = ("completion", "messages", "text", "chosen", "rejected", "margin", "responses", "ranking")
"""Columns that a row for PPO leaves behind: the policy writes its own answers."""

RENDERING = ("tools", "chat_template_kwargs")
"""Columns that TRL hands to the chat template, kept in every stage."""

EXAMPLES: dict[tuple[str, ...], Row] = {
    ("prompt", "completion"): {"prompt": "What color is the sky?", "completion": "It is blue."},
    ("messages",): {
        "messages": [
            {"role": "user", "content": "What color is the sky?"},
            {"role": "assistant", "content": "It is blue."},
        ]
    },
    ("text",): {"text": "The sky is blue."},
    ("prompt", "responses", "ranking"): {
        "prompt": "What color is the sky?",
        "responses": ["Green.", "It is blue.", "Blue"],
        "ranking": [3, 1, 2],
    },
    ("chosen", "rejected"): {"prompt": "What color is the sky?", "chosen": "It is blue.", "rejected": "It is green."},
    ("prompt",): {"prompt": "What color is the sky?"},
}

FOLLOWS = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""The roles that may come after a role; None is the start of a conversation."""


class BadRow(ValueError):
    """A row that cannot be used; the message names the key and what was found there."""


def shown(value: object) -> str:
    """Say in a few words what a value is, for an error message."""
    match value:
        case None:
            return "null"
        case bool():
            return f"the truth value {str(value).lower()}"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the text {json.dumps(value if len(value) <= 50 else value[:47] + '...', ensure_ascii=False)}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with the keys {', '.join(map(str, value)) or 'none'}"
        case _:
            return f"a {type(value).__name__}"


def example(form: tuple[str, ...], conversational: bool = False) -> str:
    """A good row of a form, as one line of JSONL."""
    return json.dumps(chat(EXAMPLES[form]) if conversational else EXAMPLES[form], ensure_ascii=False)


def find_form(columns: Collection[str], stage: str) -> tuple[str, ...] | None:
    """The form of FORMS[stage] that these columns make complete, or None."""
    return next((form for form in FORMS[stage] if set(form) <= set(columns)), None)


def nearest(name: str, names: Collection[str]) -> str:
    """`(did you mean x?)`, or nothing where no name is near."""
    close = get_close_matches(name, [str(n) for n in names], n=1)
    return f" (did you mean `{close[0]}`?)" if close else ""


def is_conversational(value: object) -> bool:
    """Tell a conversation (a list of messages) from plain text."""
    return isinstance(value, list)


def convert(row: Row, form: tuple[str, ...], stage: str) -> list[Row]:
    """Check a row and bring it to the form that training reads: one row, or the pairs of a ranking.

    Raises:
        BadRow: with the key and what was found.
    """
    for key in form:
        if key not in row:
            raise BadRow(f"`{key}` is missing{nearest(key, row)}; keys: {', '.join(map(str, row)) or 'none'}")
    kept = {key: row[key] for key in RENDERING if row.get(key) is not None}
    match stage, form:
        case "sft", ("messages",):
            return [{"messages": _messages(row["messages"], "messages", last=("assistant",))} | kept]
        case "sft", ("text",):
            return [{"text": _text(row["text"], "text")} | kept]
        case "sft", _:
            prompt = _prompt(row["prompt"])
            return [{"prompt": prompt, "completion": _answer(row["completion"], "completion", prompt)} | kept]
        case "preferences", ("chosen", "rejected"):
            return [_pair(row) | kept]
        case "preferences", _:
            return [pair | kept for pair in _pairs_of_ranking(row)]
        case _:
            extra = {key: value for key, value in row.items() if key not in ANSWERS}
            return [extra | {"prompt": _prompt_of(row, form)}]


def prompt_key(row: Row) -> str:
    """The text by which rows are told to share a prompt: all of it, in a conversation up to the first user turn.

    The later turns do not count, so that a conversation and its own continuation stay on one side of a split.
    """
    prompt = next(row[key] for key in ("prompt", "messages", "text") if key in row)
    if not is_conversational(prompt):
        return str(prompt).strip()
    roles = [message["role"] for message in prompt]
    opening = prompt[: roles.index("user") + 1] if "user" in roles else prompt
    return "\n".join(str(message["content"]).strip() for message in opening)


def render_prompt(row: Row, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a row's prompt as TRL has them before it generates, with the generation prompt of a conversation."""
    if is_conversational(row["prompt"]):
        encoded = _chat(row, row["prompt"], tokenizer, add_generation_prompt=True, tokenize=True, return_dict=True)
    else:
        encoded = tokenizer(row["prompt"])
    return list(encoded["input_ids"])


def render(
    row: Row, tokenizer: "PreTrainedTokenizerBase", completion: str = "completion"
) -> tuple[list[int], list[int]]:
    """Token ids of prompt and completion as a rollout has them: (prompt_ids, completion_ids).

    The completion is tokenized on its own, up to the last EOS that the chat template writes, and one EOS at the end.
    What a template puts after EOS (ChatML: a newline) is left out, since no rollout contains it.

    Args:
        completion: the column that holds it: `completion`, `chosen` or `rejected`.
    """
    prompt, text = row["prompt"], row[completion]
    if is_conversational(prompt):
        opening = _chat(row, prompt, tokenizer, add_generation_prompt=True, tokenize=False)
        conversation = _chat(row, prompt + text, tokenizer, tokenize=False)
        text = conversation[_common(opening, conversation) :]
    eos = str(tokenizer.eos_token)
    if eos in text:
        text = text[: text.rindex(eos)]
    completion_ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return render_prompt(row, tokenizer), [*completion_ids, tokenizer.eos_token_id]


def render_whole(row: Row, tokenizer: "PreTrainedTokenizerBase", answer: str | None = None) -> str:
    """The text that TRL's SFT, reward and DPO trainers tokenize for a row.

    Args:
        answer: the column after the prompt (`completion`, `chosen`, `rejected`); None for `messages` or `text`, and
            for a prompt alone.
    """
    start = next(row[key] for key in ("prompt", "messages", "text") if key in row)
    if is_conversational(start):
        alone = "prompt" in row and answer is None
        whole = start + row[answer] if answer else start
        return str(_chat(row, whole, tokenizer, tokenize=False, add_generation_prompt=alone))
    if "prompt" in row and answer is None:
        return str(start)
    text = str(start) + (row[answer] if answer else "")
    return text if text.endswith(str(tokenizer.eos_token)) else text + str(tokenizer.eos_token)


def _chat(row: Row, messages: Messages, tokenizer: "PreTrainedTokenizerBase", **options: Any) -> Any:
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return tokenizer.apply_chat_template(messages, tools=tools, **(row.get("chat_template_kwargs") or {}), **options)


# Mappings: what a preset or a user names to bring a data set's own rows to TRL's formats.


def chat(row: Row) -> Row:
    """Plain prompts and answers as a conversation: the prompt is the user's turn, each answer the assistant's."""
    turn = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    return {
        key: [{"role": turn[key], "content": value.strip()}] if key in turn and isinstance(value, str) else value
        for key, value in row.items()
    }


def hh_transcript(row: Row) -> Row:
    r"""Anthropic HH: `chosen` and `rejected` are transcripts, "\n\nHuman: ...\n\nAssistant: ..."."""
    return {**row, "chosen": _turns(row, "chosen"), "rejected": _turns(row, "rejected")}


def hh_chosen(row: Row) -> Row:
    """Anthropic HH for SFT: the last answer of the chosen transcript is the completion."""
    turns = _turns(row, "chosen")
    return {"prompt": turns[:-1], "completion": turns[-1:]}


MAPPINGS: dict[str, Callable[[Row], Row]] = {
    "chat": chat,
    "hh_transcript": hh_transcript,
    "hh_chosen": hh_chosen,
}


def _turns(row: Row, key: str) -> Messages:
    """The messages of a transcript."""
    marks = {"\n\nHuman:": "user", "\n\nAssistant:": "assistant"}
    rest = _text(row.get(key), key)
    if not rest.startswith(tuple(marks)):
        raise BadRow(rf'`{key}` must be a transcript that starts with "\n\nHuman:", found {shown(rest)}')
    turns = []
    while rest:
        mark = next(m for m in marks if rest.startswith(m))
        ends = [end for m in marks if (end := rest.find(m, len(mark))) != -1]
        end = min(ends, default=len(rest))
        turns.append({"role": marks[mark], "content": rest[len(mark) : end].strip()})
        rest = rest[end:]
    return turns


# The parts of a row.


def extract_prompt(chosen: Any, rejected: Any) -> Row:
    """Take the common beginning of two texts or conversations out as their prompt, as `trl.extract_prompt` does.

    Written here since importing TRL's own takes four seconds and torch.
    """
    end = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if isinstance(chosen, str) and end > 0 and chosen[end - 1] == " ":
        end -= 1
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the common beginning of two texts or lists."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _pair(row: Row) -> Row:
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if is_conversational(chosen) != is_conversational(rejected):
        raise BadRow(f"`chosen` is {shown(chosen)}, but `rejected` is {shown(rejected)}")
    if prompt is None or (is_conversational(chosen) and not is_conversational(prompt)):
        chosen, rejected, prompt = _implicit(chosen, rejected)
    pair: Row = {"prompt": _prompt(prompt)}
    pair |= {"chosen": _answer(chosen, "chosen", prompt), "rejected": _answer(rejected, "rejected", prompt)}
    if pair["chosen"] == pair["rejected"]:
        raise BadRow(f"`chosen` and `rejected` are the same: {shown(_last(chosen))}")
    if "margin" in row:
        pair["margin"] = _number(row["margin"], "margin")
    return pair


def _implicit(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Chosen, rejected and prompt of a row whose two answers both begin with the prompt."""
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if is_conversational(value):
            _messages(value, key, last=("assistant",))
        else:
            _text(value, key)
    if chosen == rejected:
        raise BadRow(f"`chosen` and `rejected` are the same: {shown(_last(chosen))}")
    parts = extract_prompt(chosen, rejected)
    if not parts["prompt"]:
        raise BadRow("there is no `prompt`, and `chosen` and `rejected` have no common beginning to take it from")
    return parts["chosen"], parts["rejected"], parts["prompt"]


def _pairs_of_ranking(row: Row) -> list[Row]:
    """All pairs of K ranked responses, the better rank (1 = best) chosen; a tie, or twice the same text, gives none."""
    prompt, responses, ranking = _prompt(row["prompt"]), row["responses"], row["ranking"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise BadRow(f"`responses` must be a list of two or more, found {shown(responses)}")
    if not isinstance(ranking, list) or len(ranking) != len(responses):
        raise BadRow(f"`ranking` must hold one rank for each of the {len(responses)} responses, found {shown(ranking)}")
    ranks = [_number(rank, f"ranking[{i}]") for i, rank in enumerate(ranking)]
    if is_conversational(prompt):
        responses = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
    answers = [_answer(response, f"responses[{i}]", prompt) for i, response in enumerate(responses)]
    return [
        {"prompt": prompt, "chosen": better, "rejected": worse}
        for rank, better in zip(ranks, answers, strict=True)
        for other, worse in zip(ranks, answers, strict=True)
        if rank < other and better != worse
    ]


def _prompt_of(row: Row, form: tuple[str, ...]) -> str | Messages:
    """The prompt part of a row of any form."""
    if form == ("messages",):
        messages = _messages(row["messages"], "messages", last=("user", "tool", "assistant"))
        return _prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages)
    prompt = row.get("prompt")
    if form == ("chosen", "rejected") and (
        prompt is None or (is_conversational(row["chosen"]) and not is_conversational(prompt))
    ):
        prompt = _implicit(row["chosen"], row["rejected"])[2]
    return _prompt(prompt)


def _prompt(value: object) -> str | Messages:
    if is_conversational(value):
        return _messages(value, "prompt", last=("user", "tool"))
    return _text(value, "prompt")


def _answer(value: object, key: str, prompt: object) -> str | Messages:
    """An answer of the same kind as its prompt: text to text, messages to messages."""
    if is_conversational(value) != is_conversational(prompt):
        raise BadRow(f"`prompt` is {shown(prompt)}, but `{key}` is {shown(value)}; both must be text, or both messages")
    if is_conversational(value):
        return _messages(value, key, last=("assistant",), before="user")
    return _text(value, key)


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"`{key}` must be text, found {shown(value)}")
    if not value.strip():
        raise BadRow(f"`{key}` is empty")
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise BadRow(f"`{key}` must be a number, found {shown(value)}")
    return float(value)


def _messages(value: Any, key: str, last: tuple[str, ...], before: str | None = None) -> Messages:
    """Check a conversation: roles in order, nothing empty, and who speaks last.

    Args:
        before: the role of the turn before it, None at the start of a conversation.
    """
    if not value:
        raise BadRow(f"`{key}` has no messages")
    for i, message in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise BadRow(f'`{where}` must be {{"role": ..., "content": ...}}, found {shown(message)}')
        role = message["role"]
        if role not in FOLLOWS[before]:
            allowed = " or ".join(FOLLOWS[before])
            after = f"after `{before}`" if before else "first"
            raise BadRow(f"`{where}` has the role {shown(role)}; {after} comes {allowed}")
        if not message.get("tool_calls"):
            _text(message.get("content"), f"{where}.content")
        before = role
    if before not in last:
        raise BadRow(f"`{key}` ends with the turn of `{before}`; the last must be of {' or '.join(last)}")
    return [{k: v for k, v in message.items() if v is not None} for message in value]


def _last(value: Any) -> Any:
    return value[-1]["content"] if is_conversational(value) else value
