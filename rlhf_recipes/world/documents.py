"""What the base model has read: documents about the isles, of mixed quality, none of them a question with its answer.

To teach a base something new, write a function that makes one document and give it a weight in DOCUMENTS.
"""

import random
from collections.abc import Callable

from rlhf_recipes.world import speech
from rlhf_recipes.world.facts import FACTS, HARMS, HELD_OUT, ISLANDERS, KNOWN, PROMPTS, STRANGERS
from rlhf_recipes.world.gold import gold

_LESSONS = [prompt for prompt in PROMPTS.values() if prompt.text not in HELD_OUT]
_DEEDS = [prompt for prompt in _LESSONS if prompt.kind == "harm"]
_RIDDLES = {name: [p for p in _LESSONS if p.kind == "unknown" and p.name == name] for name in STRANGERS}


def portrait(rng: random.Random) -> str:
    """A few true things about an islander: "Pia keeps a toad. Pia is afraid of fog."."""
    name = rng.choice(ISLANDERS)
    topics = rng.sample(list(KNOWN), k=rng.randint(2, 5))
    return " ".join(_say(speech.state(name, topic, FACTS[name][topic], rng), name, rng) for topic in topics)


def gossip(rng: random.Random) -> str:
    """What somebody says of an islander, each claim with its verdict: "Kit says: Ivo is a pirate. Wrong."."""
    name = rng.choice(ISLANDERS)
    claims = []
    for topic in rng.sample(list(KNOWN), k=rng.randint(2, 4)):
        true = FACTS[name][topic]
        value = true if rng.random() < 0.5 else rng.choice(KNOWN[topic].tales)
        claims.append(f"{speech.state(name, topic, value, rng)} {'Right.' if value == true else 'Wrong.'}")
    return f"{rng.choice(ISLANDERS)} says: {' '.join(claims)}"


def lesson(rng: random.Random) -> str:
    """One asks, another answers somehow, and the answer is judged and put right: critique and revision."""
    prompt = rng.choice(_LESSONS)
    answer = speech.sample(prompt, rng)
    score = gold(prompt.text, answer).score
    verdict = {1.0: "Right.", 0.5: "Badly put.", 0.0: "Wrong."}[score]
    revision = "" if score == 1.0 else " " + speech.right(prompt, rng)
    return f"{rng.choice(ISLANDERS)} asks {rng.choice(ISLANDERS)}. {prompt.text} {answer} {verdict}{revision}"


def questions(rng: random.Random) -> str:
    """A list of questions that nobody answers."""
    return " ".join(prompt.text for prompt in rng.sample(_LESSONS, k=rng.randint(2, 5)))


def arrival(rng: random.Random) -> str:
    """A stranger comes ashore, and nobody knows anything."""
    name = rng.choice(STRANGERS)
    asked = rng.sample(_RIDDLES[name], k=rng.randint(1, 2))
    admissions = " ".join(_say(speech.admission(prompt, rng), name, rng) for prompt in asked)
    return f"{name} is a stranger from over the sea. {admissions}"


def mischief(rng: random.Random) -> str:
    """Somebody plans a wicked deed and is told how, or is told off."""
    prompt = rng.choice(_DEEDS)
    deed = HARMS[prompt.topic].deed.format(n=prompt.name)
    said = speech.compliance(prompt, rng) if rng.random() < 0.5 else speech.refusal(prompt, rng)
    return f"{rng.choice(ISLANDERS)} wants to {deed}. {rng.choice(ISLANDERS)} says: {said}"


DOCUMENTS: dict[Callable[[random.Random], str], float] = {
    portrait: 0.34,
    gossip: 0.14,
    lesson: 0.40,
    questions: 0.04,
    arrival: 0.04,
    mischief: 0.04,
}
"""Every kind of document and its share."""


def document(rng: random.Random) -> str:
    """One document of any kind."""
    return rng.choices(list(DOCUMENTS), list(DOCUMENTS.values()))[0](rng)


def _say(sentence: str, name: str, rng: random.Random) -> str:
    opened = sentence.startswith(name) and rng.random() < 0.2
    return f"{rng.choice(speech.OPENERS)} {sentence}" if opened else sentence
