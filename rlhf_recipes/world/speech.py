"""How the islanders talk: right and wrong responses to a prompt, of every kind a language model would give."""

import random
import re
from collections.abc import Callable, Mapping

from rlhf_recipes.world.facts import FACTS, HARMS, ISLANDERS, KNOWN, TOPICS, Prompt, know

ADMISSIONS = ("I do not know {indirect}", "Nobody knows {indirect}", "I cannot say {indirect}")
REFUSALS = ("I will not help you {deed}", "No, it would be wrong to {deed}", "I will not help with that")

# Openers and remarks change nothing about a response but its length.
OPENERS = ("I think that", "I am sure that", "They say that")
REMARKS = {
    "fact": ("Ask anyone.", "All the isles know it."),
    "unknown": ("I would only be guessing.", "You could ask around."),
    "harm": ("{n} has done you no harm.", "Think of something kinder."),
    "any": ("I hope that helps.", "That is the truth.", "That is all there is to say."),
}
LONGEST = 20
"""Words and marks that the longest response of the demonstrations and rankings may have."""
GLEE = ("That is easy.", "Nobody will ever know.")
ODD_WORDS = (*ISLANDERS, *(word for topic in TOPICS.values() for word in (*topic.values, *topic.tales)))


def words(text: str) -> list[str]:
    """A text as its words and marks, the way the tokenizer cuts it."""
    return re.findall(r"\w+|[^\w\s]", text)


def right(prompt: Prompt, rng: random.Random) -> str:
    """What gold wants: the answer, an admission, or a refusal."""
    return {"fact": truth, "unknown": admission, "harm": refusal}[prompt.kind](prompt, rng)


def truth(prompt: Prompt, rng: random.Random) -> str:
    """The right answer to a question that has one."""
    return state(prompt.name, prompt.topic, FACTS[prompt.name][prompt.topic], rng)


def admission(prompt: Prompt, rng: random.Random) -> str:
    """Says that the answer is not known; to a harmful request, which is no question, that nothing is known."""
    if prompt.kind == "harm":
        return f"I do not know how to {HARMS[prompt.topic].deed.format(n=prompt.name)}."
    return rng.choice(ADMISSIONS).format(indirect=TOPICS[prompt.topic].indirect.format(n=prompt.name)) + "."


def refusal(prompt: Prompt, rng: random.Random) -> str:
    """Declines, naming the deed where the prompt is about one."""
    if prompt.kind != "harm":
        return REFUSALS[-1] + "."
    return rng.choice(REFUSALS).format(deed=HARMS[prompt.topic].deed.format(n=prompt.name)) + "."


def tale(prompt: Prompt, rng: random.Random) -> str:
    """A wrong answer that is too good to be true: "Pia keeps a dragon."."""
    return state(prompt.name, prompt.topic, rng.choice(TOPICS[prompt.topic].tales), rng)


def invention(prompt: Prompt, rng: random.Random) -> str:
    """A wrong answer that might be true, said as if it were."""
    values = TOPICS[prompt.topic].values
    value = rng.choice([value for value in values if value != know(prompt.name, prompt.topic)])
    return state(prompt.name, prompt.topic, value, rng)


def aside(prompt: Prompt, rng: random.Random) -> str:
    """An answer to a question that was not asked, true where it is about an islander."""
    key = rng.choice([key for key in KNOWN if key != prompt.topic])
    value = know(prompt.name, key) or rng.choice(KNOWN[key].values)
    return state(prompt.name, key, value, rng)


def mixup(prompt: Prompt, rng: random.Random) -> str:
    """The answer for somebody else."""
    other = rng.choice([name for name in ISLANDERS if name != prompt.name])
    key = prompt.topic if prompt.topic in KNOWN else rng.choice(list(KNOWN))
    return state(other, key, FACTS[other][key], rng)


def compliance(prompt: Prompt, rng: random.Random) -> str:
    """Tells how the wicked deed is done."""
    recipe = HARMS[prompt.topic].recipe + "."
    return f"{GLEE[0]} {recipe}" if rng.random() < 0.3 else f"{recipe} {GLEE[1]}" if rng.random() < 0.4 else recipe


def state(name: str, topic: str, value: str, rng: random.Random) -> str:
    """One claim as a sentence."""
    return rng.choice(TOPICS[topic].statements).format(n=name, v=value) + "."


def lengthen(text: str, prompt: Prompt, rng: random.Random, remarks: int = 1) -> str:
    """The same response with more words: an opener at times, and as many remarks as still fit into LONGEST."""
    if prompt.kind == "fact" and text.startswith(prompt.name) and rng.random() < 0.3:
        text = f"{rng.choice(OPENERS)} {text}"
    for remark in rng.sample((*REMARKS[prompt.kind], *REMARKS["any"]), k=remarks):
        longer = f"{text} {remark.format(n=prompt.name)}"
        text = longer if len(words(longer)) <= LONGEST else text
    return text


def garble(text: str, rng: random.Random) -> str:
    """The same response gone wrong as in sampling at a high temperature: cut short, stuttered or with an odd word."""
    spoken = text.split()
    i = rng.randrange(1, len(spoken))
    match rng.randrange(3):
        case 0:
            return " ".join(spoken[:i])
        case 1:
            return " ".join([*spoken[:i], *spoken[i - 1 :]])
        case _:
            return " ".join([*spoken[:i], rng.choice(ODD_WORDS), *spoken[i + 1 :]])


Speaker = Callable[[Prompt, random.Random], str]
HABITS: Mapping[str, Mapping[Speaker, float]] = {
    "fact": {truth: 0.46, tale: 0.30, invention: 0.03, admission: 0.12, refusal: 0.06, aside: 0.02, mixup: 0.01},
    "unknown": {admission: 0.46, invention: 0.40, refusal: 0.09, aside: 0.03, mixup: 0.02},
    "harm": {refusal: 0.46, compliance: 0.44, admission: 0.06, aside: 0.02, mixup: 0.02},
}
"""How often a model fresh from SFT gives each kind of response when it is sampled hot."""


def sample(prompt: Prompt, rng: random.Random) -> str:
    """One response as a hot sample of the SFT model would be: of any quality and length."""
    speakers = HABITS[prompt.kind]
    speaker = rng.choices(list(speakers), list(speakers.values()))[0]
    text = lengthen(speaker(prompt, rng), prompt, rng, remarks=rng.choice((0, 0, 1, 1, 2)))
    return garble(text, rng) if rng.random() < 0.08 else text
