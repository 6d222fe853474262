"""Prompts to train heads of a chat model on, besides the questions it asks itself: code, word problems, stories.

python docs/make_prompts.py 2000 > prompts.jsonl

Code comes from Python's standard library, the rest from the lists below; nothing comes from a benchmark.
"""

from __future__ import annotations

import ast
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

NAMES = [
    "Ada", "Bruno", "Chen", "Dora", "Emil", "Farah", "Goran", "Hana", "Ivan", "Jelena", "Kofi", "Lena", "Milo", "Nadia",
    "Omar", "Petra", "Quinn", "Rosa", "Sven", "Tara",
]  # fmt: skip
THINGS = [
    "apples", "books", "candles", "eggs", "jars", "lemons", "letters", "marbles", "pencils", "plates", "shirts",
    "stamps", "tickets", "tiles", "towels",
]  # fmt: skip
PLACES = [
    "bakery", "farm", "garage", "garden", "harbour", "library", "market", "mill", "museum", "school", "station",
    "workshop",
]  # fmt: skip
PEOPLE = [
    "a retired clockmaker", "a lighthouse keeper", "a young pilot", "a shy librarian", "an old fisherman",
    "two sisters", "a travelling cook", "a night watchman", "a boy who never slept", "a village doctor",
    "a map seller", "a beekeeper",
]  # fmt: skip
EVENTS = [
    "finds a letter that was never sent", "loses the only key", "meets a stranger on the last train",
    "hears music from an empty house", "must cross the mountains before winter", "keeps a promise for forty years",
    "discovers a hidden room", "waits for a ship", "inherits a garden", "learns that the river will be dammed",
]  # fmt: skip
PROBLEMS = [
    "{a} has {x} {t}. {b} gives {a} {y} more, and then {a} sells {z} of them. How many {t} does {a} have left?",
    "A {p} sells {t} at ${z} each. On Monday it sells {x}, on Tuesday {y}. How much does it earn in both days?",
    "{a} reads {x} pages a day and {b} reads {y}. How many pages have they read together after {z} days?",
    "{a} packs {x} {t} into boxes of {z}. How many full boxes are there, and how many {t} remain?",
    "A trip of {x} km takes {a} {z} hours by bicycle. {b} drives three times as fast. How long does {b} need?",
    "{a} saves ${x} every week, and spends ${z} of it on {t}. How much does {a} have after {y} weeks?",
    "There are {x} rows of {y} {t} in the {p}. {a} takes away a quarter of them. How many are left?",
    "{a} is {z} years older than {b}. In {z} years the sum of their ages will be {s}. How old is {a} now?",
    "{a} works {z} hours a day at the {p} for ${y} an hour. After how many days has {a} earned ${s}?",
    "{b} buys {x} {t} for ${y} each and gets a discount of {z}0% on all of them. What does {b} pay?",
]  # fmt: skip
ASK = ["{}", "Question: {}\nAnswer:", "{} Think step by step.", "Solve this problem: {}"]
TELL = [
    "Write a short story about {} who {}.",
    "Continue this story: Once, {} {}, and",
    "Describe a scene in which {} {}.",
]
CODE = ["{}", "Complete this Python function:\n\n{}", "```python\n{}```\nWrite the body of this function."]


def functions() -> Iterator[str]:
    """Heads of functions with their docstrings, from the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        source = path.read_text("utf-8", "replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and len(ast.get_docstring(node) or "") > 40:
                lines = source.splitlines()[node.lineno - 1 : node.body[0].end_lineno]
                indent = len(lines[0]) - len(lines[0].lstrip())
                text = "\n".join(line[indent:] for line in lines) + "\n"
                if len(text) < 900:
                    yield text


def problem(rng: random.Random) -> str:
    a, b = rng.sample(NAMES, 2)
    z = rng.randint(2, 9)
    x, y = z * rng.randint(3, 20), rng.randint(3, 40)
    facts = {"a": a, "b": b, "x": x, "y": y, "z": z, "s": x + y + 4 * z}
    return rng.choice(PROBLEMS).format(t=rng.choice(THINGS), p=rng.choice(PLACES), **facts)


def prompts(n: int, seed: int = 0) -> Iterator[dict[str, str]]:
    rng = random.Random(seed)
    code = list(functions())
    for i in range(n):
        if i % 3 == 0:
            yield {"task": "code", "prompt": rng.choice(CODE).format(rng.choice(code))}
        elif i % 3 == 1:
            yield {"task": "problems", "prompt": rng.choice(ASK).format(problem(rng))}
        else:
            yield {
                "task": "stories",
                "prompt": rng.choice(TELL).format(rng.choice(PEOPLE), rng.choice(EVENTS)),
            }


if __name__ == "__main__":
    for item in prompts(int(sys.argv[1]) if len(sys.argv) > 1 else 1000):
        print(json.dumps(item, ensure_ascii=False))
