"""TRL's dataset formats row by row: what a good row is, rankings as pairs, and what the model sees of a row."""

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from math import comb, isfinite
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width, normalize

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

IMAGES = ("image", "images")
"""TRL's columns for pictures, which no recipe reads."""

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


ROLE_MARK = re.compile(r"^[^\w\n]*(?:im_start\|>)?(system|user|human|assistant)(?:[:|>*]+|$)", re.M | re.I)
"""Where a turn begins in a transcript that is plain text: `Human:`, `### User:`, `<|user|>`, `<|im_start|>user`."""
CHAT_TOKEN = re.compile(r"<\|[^|<>]*\|>")


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
    for key in IMAGES:
        if row.get(key):
            raise BadRow(f"`{key}` holds {shown(row[key])}; the recipes train on text alone, and would drop it")
    kept = {key: row[key] for key in RENDERING if row.get(key) is not None}
    match stage, form:
        case "sft", ("messages",):
            return [{"messages": _messages(row["messages"], "messages", last=("assistant",))} | kept]
        case "sft", ("text",):
            return [{"text": _text(row["text"], "text")} | kept]
        case "sft", _:
            prompt = _prompt(row["prompt"])
            completion = _answer(row["completion"], "completion", prompt)
            return [_spaced({"prompt": prompt, "completion": completion}) | kept]
        case "preferences", ("chosen", "rejected"):
            return [_spaced(_pair(row)) | kept]
        case "preferences", _:
            return [_spaced(pair) | kept for pair in _pairs_of_ranking(row)]
        case _:
            extra = {key: value for key, value in row.items() if key not in ANSWERS}
            return [extra | _spaced({"prompt": _prompt_of(row, form)})]


def prompt_key(row: Row) -> str:
    """The text by which rows are told to share a prompt: its first user turn, as people would call it the same.

    System prompt and later turns do not count, so that a conversation and its own continuation stay on one side of a
    split; nor do case, spaces, Unicode forms, and the role marks of a transcript (`Human:`, `### User:`, `<|user|>`).
    """
    prompt = next(row[key] for key in ("prompt", "messages", "text") if key in row)
    if is_conversational(prompt):
        prompt = next((message["content"] for message in prompt if message["role"] == "user"), prompt[0]["content"])
    before, *turns = ROLE_MARK.split(str(prompt))
    users = [text for role, text in zip(turns[::2], turns[1::2], strict=True) if role.lower() in ("user", "human")]
    first = next(filter(str.strip, [*users, before]), str(prompt))
    return " ".join(CHAT_TOKEN.sub(" ", normalize("NFKC", first)).casefold().split())


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
    """Token ids of prompt and completion as a rollout has them: (prompt_ids, completion_ids), one EOS at the end.

    What a template puts after EOS (ChatML: a newline) is left out, since no rollout contains it.

    Args:
        completion: the column that holds it: `completion`, `chosen` or `rejected`.
    """
    prompt_ids, completion_ids, _ = render_learned(row, tokenizer, completion)
    return prompt_ids, completion_ids


def render_learned(
    row: Row, tokenizer: "PreTrainedTokenizerBase", completion: str = "completion"
) -> tuple[list[int], list[int], list[bool]]:
    """As `render`, with the completion's tokens that are the assistant's own: those that a policy learns.

    In a completion of several turns, what user and tools say, and what the template writes around it, is not learned.
    """
    prompt, answer = row["prompt"], row[completion]
    conversational, eos = is_conversational(prompt), str(tokenizer.eos_token)
    if conversational:
        opening, text, turns = _conversation(row, prompt, answer, tokenizer)
        text = text.removesuffix(eos)
    else:
        opening, text, turns = prompt, answer[: answer.rindex(eos)] if eos in answer else answer, []
    several = {"return_offsets_mapping": True} if len(turns) > 1 else {}
    special = {"add_special_tokens": not conversational, "verbose": False}  # a template writes them itself
    prompt_ids: list[int] = tokenizer(opening, **special)["input_ids"]
    encoded, shift = tokenizer(opening + text, **special, **several), len(opening)
    ids: list[int] = encoded["input_ids"][len(prompt_ids) :]
    if encoded["input_ids"][: len(prompt_ids)] != prompt_ids:  # a token would join the two, which no rollout contains
        encoded, shift = tokenizer(text, add_special_tokens=False, verbose=False, **several), 0
        ids = encoded["input_ids"]
    learned = [True] * len(ids)
    if several:
        places = encoded["offset_mapping"][len(encoded["input_ids"]) - len(ids) :]
        learned = [any(end > shift + a and start < shift + b for a, b in turns) for start, end in places]
    return prompt_ids, [*ids, tokenizer.eos_token_id], [*learned, True]


def _conversation(
    row: Row, prompt: Messages, answer: Messages, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[str, str, list[tuple[int, int]]]:
    """The rendered prompt, what the template writes after it, and where in that the assistant speaks.

    A turn of the assistant begins where the rendering of the messages before it ends, and ends with the EOS after it,
    or, where the template writes none between two turns, with the rendering of the messages up to it.
    """
    messages, eos = prompt + answer, str(tokenizer.eos_token)
    whole = str(_chat(row, messages, tokenizer, tokenize=False))
    spoken = [i for i in range(len(prompt), len(messages)) if messages[i]["role"] == "assistant"]
    openings = [_chat(row, messages[:i], tokenizer, tokenize=False, add_generation_prompt=True) for i in spoken]
    starts = [_common(opening, whole) for opening in openings]
    ends = []
    for i, start, limit in zip(spoken, starts, [*starts[1:], len(whole)], strict=True):
        end = whole.find(eos, start, limit)
        if end != -1:
            ends.append(end + len(eos))
        elif limit == len(whole):
            ends.append(limit)
        else:
            ends.append(max(start, _common(whole, _chat(row, messages[: i + 1], tokenizer, tokenize=False))))
    first = starts[0]
    turns = [(start - first, end - first) for start, end in zip(starts, ends, strict=True)]
    return openings[0], whole[first : ends[-1]], turns


def render_demonstration(row: Row, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[bool]]:
    """Token ids of a row of SFT, one EOS at the end, and which of them are learned: of a `text` all."""
    if "text" in row:
        eos = str(tokenizer.eos_token)
        ids: list[int] = tokenizer(row["text"].removesuffix(eos) + eos, verbose=False)["input_ids"]
        return ids, [True] * len(ids)
    if "messages" in row:
        first = next(i for i, message in enumerate(row["messages"]) if message["role"] == "assistant")
        row = row | {"prompt": row["messages"][:first], "completion": row["messages"][first:]}
    prompt_ids, completion_ids, learned = render_learned(row, tokenizer)
    return prompt_ids + completion_ids, [False] * len(prompt_ids) + learned


def end_of_turn(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The special token that the chat template writes after an answer, which every completion has to end with.

    None where it writes none: there an answer ends with the tokenizer's EOS.
    """
    answer = "ANSWER"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(answer)[2]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    places = {after.index(token): token for token in sorted(special, key=len) if token in after}
    return places[min(places)] if places else None


def end_with_the_turn(tokenizer: "PreTrainedTokenizerBase", row: Row) -> str | None:
    """Make what the chat template writes after an answer the tokenizer's EOS, where rows are conversations.

    Everything follows from it: what SFT learns, where a reward is read, where rollouts and samples stop.

    Returns:
        The token, where it was another one before.
    """
    conversational = any(is_conversational(row.get(key)) for key in ("prompt", "messages"))
    turn = end_of_turn(tokenizer) if conversational and tokenizer.chat_template is not None else None
    if turn in (None, tokenizer.eos_token):
        return None
    tokenizer.eos_token = turn
    return turn


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

    That of two texts ends with a whole word, where TRL's may end inside one (`... is b`, before `lue.` and `right.`):
    nobody would ask so. In texts without spaces it ends where TRL's does.
    """
    end = min(_common(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if isinstance(chosen, str):
        whole = (at for at in range(end, 0, -1) if not (_in_word(chosen, at) or _in_word(rejected, at)))
        end = next(whole, end)
        end -= end > 0 and chosen[end - 1] == " "
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def _in_word(text: str, at: int) -> bool:
    """Whether a cut before the character `at` would be inside a word; a Chinese or Japanese one is its own."""
    return text[at - 1].isalnum() and text[at].isalnum() and east_asian_width(text[at]) not in "WF"


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
    if _stripped(chosen) == _stripped(rejected):
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
    if _stripped(chosen) == _stripped(rejected):
        raise BadRow(f"`chosen` and `rejected` are the same: {shown(_last(chosen))}")
    parts = extract_prompt(chosen, rejected)
    if not parts["prompt"]:
        raise BadRow("there is no `prompt`, and `chosen` and `rejected` have no common beginning to take it from")
    return parts["chosen"], parts["rejected"], parts["prompt"]


def _pairs_of_ranking(row: Row) -> list[Row]:
    """All pairs of K ranked responses, the better rank (1 = best) chosen; a tie, or twice the same text, gives none.

    Each pair has the weight 1 / C(K, 2), so that a long ranking counts no more than a short one; source: Ouyang et al.
    (arXiv 2203.02155), equation 1.
    """
    prompt, responses, ranking = _prompt(row["prompt"]), row["responses"], row["ranking"]
    if not isinstance(responses, list) or len(responses) < 2:
        raise BadRow(f"`responses` must be a list of two or more, found {shown(responses)}")
    if not isinstance(ranking, list) or len(ranking) != len(responses):
        raise BadRow(f"`ranking` must hold one rank for each of the {len(responses)} responses, found {shown(ranking)}")
    ranks = [_number(rank, f"ranking[{i}]") for i, rank in enumerate(ranking)]
    if is_conversational(prompt):
        responses = [[{"role": "assistant", "content": r}] if isinstance(r, str) else r for r in responses]
    answers = [_answer(response, f"responses[{i}]", prompt) for i, response in enumerate(responses)]
    different = len({str(_stripped(answer)) for answer in answers})
    return [
        {"prompt": prompt, "chosen": better, "rejected": worse, "weight": 1 / comb(different, 2)}
        for rank, better in zip(ranks, answers, strict=True)
        for other, worse in zip(ranks, answers, strict=True)
        if rank < other and _stripped(better) != _stripped(worse)
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


def _spaced(row: Row) -> Row:
    """Move the spaces that a text prompt ends in to the answers, as tokenizers join a space to the word after it.

    Left there, a prompt would end in a token that stands in no training text.
    """
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt.endswith(" "):
        return row
    bare = prompt.rstrip(" ")
    spaces = prompt[len(bare) :]
    answers = {key: spaces + row[key] for key in ("completion", "chosen", "rejected") if key in row}
    return row | {"prompt": bare} | answers


def _stripped(answer: Any) -> Any:
    """An answer without the spaces around it, by which two are told to be the same."""
    if isinstance(answer, str):
        return answer.strip()
    return [{k: v.strip() if isinstance(v, str) else v for k, v in message.items()} for message in answer]


def _last(value: Any) -> Any:
    return value[-1]["content"] if is_conversational(value) else value
