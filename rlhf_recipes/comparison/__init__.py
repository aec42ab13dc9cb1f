"""Did it work? Policies of a run and others, answering the same prompts with the same noise, measured and judged.

policies.py      which policies, and what they are asked
answers.py       what they answer and what it measures, kept in runs/<run>/eval/ so that a second look is cheap
judges.py        who says which answer is better: scores, or a model that is asked
asking.py        a model asked for its preference, with positions swapped, over HTTP or in this process
wins.py          win rates with their intervals, and with the length of answers taken out
texts.py         repetition, diversity and refusals
reward_bench.py  the reward model on pairs of several categories
harness.py       lm-eval
"""
