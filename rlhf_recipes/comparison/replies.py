"""What a judge's reply says: A, B or a tie, however it is dressed; nothing where that is not plain."""

import re
from typing import Literal, cast

Reply = Literal["A", "B", "T"]
"""Which answer is better, the first or the second; T: neither."""

ANSWER = r"(?:answer|response|reply|option|assistant|candidate|choice)"
TIE = r"(?:(?:a )?(?:tie|draw)|tied)"
PICK = rf"(?:{ANSWER} )?[\[({{]*\b(?P<pick>[ABT]|{TIE})\b[\])}}]*(?: \({TIE}\))?"
LABEL = (
    rf"(?:(?:my|the) )?(?:(?:final|overall|better|best|preferred|chosen|correct) )*"
    rf"(?:{ANSWER}|verdict|winner|decision|preference|judge?ment|result|conclusion|pick|vote|one|better|best|preferred"
    "|antwort|réponse|respuesta|risposta|ответ|回答|答案) ?(?:is|[:=\uff1a])+ ?"
)
OPENING = (
    rf"(?:{LABEL}|(?:I|we)(?:d| would|ll| will)? (?:choose|prefer|pick|select|vote for|go with|say) "
    r"|(?:it|this)(?:s| is) )"
)
ADVERB = r"(?:the|clearly|slightly|much|far|somewhat|marginally|overall|definitely)"
WINS = (
    rf" (?:wins|is (?:{ADVERB} )*(?:better|best|superior|preferable|preferred|stronger|winner)(?: (?:{ANSWER}|one))?"
    rf"(?: than (?:{ANSWER} )?[AB])?)(?: overall)?"
)
BECAUSE = r",? (?:because|since|as (?:it|the|this)|due to) .*"
EQUAL = (
    rf"(?:both|they|the two|(?:the |both )?{ANSWER}s(?: A and B)?|A and B)(?: {ANSWER}s)? are "
    r"(?:about |roughly )?(?:equal|equally good|equally bad|equivalent|tied|the same)"
    rf"|neither(?: {ANSWER}| one)?(?: is (?:clearly )?better)?|equal(?:ly good)?"
)
SO = r"(?:(?:so|thus|therefore|hence|overall|finally|however|but|yet|in conclusion),? )?"
CHOICE = rf"(?P<opening>{OPENING})?{PICK}(?P<wins>{WINS})?(?: (?:over|to) (?:{ANSWER} )?[AB])?(?:{BECAUSE})?"
STATEMENT = re.compile(rf"\W*{SO}(?:{CHOICE}|(?P<equal>{EQUAL}))\W*", re.IGNORECASE)
"""A sentence that says which answer is better and nothing else, but for its reason."""
TAGGED = re.compile(rf"(?:\\boxed ?{{|<(answer|verdict|choice)>|\[\[)\W*{PICK}\W*(?:}}|</\1>|\]\])", re.IGNORECASE)
WITH_REASON = re.compile(rf"\W*{PICK} ?[:,;\u2013\u2014-] ?(?P<reason>\w.*)", re.IGNORECASE)
DOUBT = re.compile(r"\b(?:wait|actually|on reflection|reconsider\w*|second thoughts?|changed my mind)\b", re.IGNORECASE)
OTHER = {
    "A": r"\bB\b|(?i:\b(?:second|latter|other|but|however)\b)",
    "B": r"\bA\b|(?i:\b(?:first|former|other|but|however)\b)",
    "T": r"\b[AB]\b",
}


def read_reply(text: str) -> Reply | None:
    """The verdict of a reply; None where there is none, or where two contradict each other.

    A tagged verdict (`\\boxed{A}`, `<answer>A</answer>`, `[[A]]`) comes first, then the last sentence, where most put
    it after reasoning, and else any other sentence that is a verdict, such as a letter with reasons after it.

    >>> read_reply("Answer B."), read_reply("<think>A, or B?</think>\\nTie"), read_reply("A\\n\\nIt is shorter.")
    ('B', 'T', 'A')
    >>> read_reply("A better one would be shorter"), read_reply("A is worse than B"), read_reply("<think>\\nA")
    (None, None, None)
    """
    text = re.split(r"</think(?:ing)?>", text, flags=re.IGNORECASE)[-1]
    if re.search(r"<think(?:ing)?>", text, re.IGNORECASE):
        return None  # cut off in the middle of its reasoning
    text = re.sub(r"[*_`\"'\u2018-\u201d$]|\\(?:text|mathbf|textbf|mathrm)(?=\W)", "", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    if tagged := {_letter(found["pick"]) for found in TAGGED.finditer(text)}:
        return tagged.pop() if len(tagged) == 1 else None
    sentences = [s for line in text.splitlines() for s in re.split(r"(?<=[\w)\]][.!;。])(?<!\d\.) ", line) if s.strip()]
    read = [_statement(sentence) for sentence in sentences]
    if not read:
        return None
    plain, sure = ({reply for reply, stressed in filter(None, read) if stressed == kind} for kind in (False, True))
    if read[-1] is not None:
        reply, stressed = read[-1]
        return reply if stressed or not plain - {reply} else None
    found = sure | plain
    if len(found) == 1 and (sure or read[0] is not None) and not DOUBT.search(text):
        return found.pop()
    return None if found else _with_reason(sentences[0], text)


def _statement(sentence: str) -> tuple[Reply, bool] | None:
    """What a sentence says, and whether in more words than a letter; None for a heading, a question and the rest."""
    found = STATEMENT.fullmatch(sentence)
    if found is None or sentence.rstrip().endswith((":", "?", "\uff1a")):
        return None
    if found["equal"]:
        return "T", True
    return _letter(found["pick"]), bool(found["opening"] or found["wins"])


def _with_reason(sentence: str, text: str) -> Reply | None:
    """The letter that a reply begins with, if it goes on with reasons that do not speak of the other answer."""
    found = WITH_REASON.fullmatch(sentence)
    if found is None:
        return None
    reply = _letter(found["pick"])
    return None if re.search(OTHER[reply], text[found.start("reason") :]) or DOUBT.search(text) else reply


def _letter(pick: str) -> Reply:
    return cast(Reply, pick.upper() if len(pick) == 1 else "T")
