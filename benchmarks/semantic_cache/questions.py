"""Requests of five kinds with known truth: what was asked in other words, and what only sounds the same.

An intent is what fixes the answer: a family of templates and the values in its slots. Two requests of one
intent are paraphrases; two intents of one family are near-misses (same words, another answer: numbers
swapped, versions, negation, names). The category ``code`` has no templates of ours: its intents are the first
sentences of docstrings in Python's standard library, whose authors wrote its near-misses (``Return the last
access time of a file`` and ``Return the last modification time of a file``).

Slot values, and the functions of ``code``, fall into two halves by a hash, so that thresholds can be chosen
on one half and certified on the other. This file and its seed were written before the slot verifier.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

SEED = 20251026
CATEGORIES = ("code", "reference", "chat", "live", "sensitive")
SHARES = {"code": 0.35, "reference": 0.25, "chat": 0.2, "live": 0.1, "sensitive": 0.1}
Half = Literal["calibrate", "test"]
INTENTS = 400  # most of a category and half
LIVE_PERIOD_S = 300.0  # an answer of the category live holds this long


def _values(text: str) -> list[str]:
    return text.split(",")


COUNTRIES = _values(
    "France,Japan,Brazil,Kenya,Norway,Peru,Egypt,Canada,India,Poland,Chile,Vietnam,Greece,Ghana,Mexico,"
    "Iceland,"
    "Morocco,Nepal,Portugal,Jordan,Austria,Bolivia,Cuba,Denmark,Estonia,Finland,Hungary,Ireland"
)
ELEMENTS = _values(
    "iron,copper,gold,silver,mercury,lead,tin,zinc,nickel,neon,argon,helium,sulfur,carbon,sodium,calcium"
)
UNITS = _values(
    "inches in a foot,ounces in a pound,pints in a gallon,feet in a mile,grams in an ounce,metres in a mile,"
    "cups in a litre,hours in a fortnight,yards in a furlong,bytes in a kibibyte,minutes in a week,"
    "days in a leap year"
)
SOFTWARE = _values("Python,PostgreSQL,Django,Ubuntu,Kubernetes,Node.js,Rust,Redis,Ruby,Go,Debian,Fedora")
VERSIONS = _values("1.2,1.21,2.0,2.1,3.4,3.11,3.12,4.2,5.0,12,12.1,22")
NUMBERS = _values("5,10,12,15,18,20,25,30,37,40,50,64,75,90,100,120")
WHO = _values(
    "my sister,my boss,a neighbour,an old friend,my teacher,my flatmate,a colleague,my grandfather,"
    "my landlord,"
    "my daughter,my coach,a classmate"
)
WHAT = _values(
    "forgetting a birthday,being late,losing a book,breaking a cup,cancelling dinner,being rude,"
    "missing a call,"
    "telling a secret,shouting,borrowing money,not replying,spoiling a film"
)
DISHES = _values(
    "pancakes,lentil soup,risotto,an omelette,rice pudding,a curry,bread,pesto,dumplings,a salad,"
    "apple pie,"
    "noodles,hummus,stew,fried rice,waffles"
)
HOBBIES = _values(
    "chess,the guitar,swimming,drawing,knitting,running,photography,gardening,juggling,the piano,"
    "climbing,"
    "cooking,dancing,calligraphy"
)
TICKERS = _values("AAPL,MSFT,NVDA,TSLA,AMZN,GOOG,IBM,INTC,AMD,ORCL,SAP,NFLX,KO,PEP,BA,DIS")
CITIES = _values(
    "Paris,Lima,Oslo,Cairo,Tokyo,Delhi,Rome,Berlin,Lisbon,Accra,Hanoi,Quito,Dublin,Vienna,Athens,Prague"
)
COINS = _values("bitcoin,ether,gold,silver,crude oil,natural gas,copper,wheat")
DRUGS = _values(
    "ibuprofen,paracetamol,aspirin,amoxicillin,cetirizine,omeprazole,metformin,loratadine,naproxen,codeine,"
    "prednisone,sertraline,warfarin,lisinopril"
)
PATIENTS = _values("adults,children,toddlers,pregnant women,breastfeeding mothers,people over 65")
CONTRACTS = _values(
    "a rental contract,an employment contract,a phone contract,a gym membership,a car lease,"
    "a freelance contract,"
    "an insurance policy,a loan agreement"
)
TERMS = _values("7 days,14 days,30 days,2 months,3 months,6 months")


@dataclass(frozen=True)
class Family:
    """Templates that ask the same in different words; ``{0}``, ``{1}`` are slots."""

    name: str
    slots: tuple[list[str], ...]
    variants: tuple[str, ...]


FAMILIES: dict[str, tuple[Family, ...]] = {
    "reference": (
        Family("capital", (COUNTRIES,), (
            "What is the capital of {0}?", "Which city is the capital of {0}?", "{0}'s capital city?",
            "Name the capital city of {0}.", "Tell me the capital of {0}",
        )),
        Family("population", (COUNTRIES,), (
            "What is the population of {0}?", "How many people live in {0}?",
            "How many inhabitants does {0} have?",
            "population size of {0}", "Tell me how many people there are in {0}.",
        )),
        Family("melting", (ELEMENTS,), (
            "What is the melting point of {0}?", "At what temperature does {0} melt?",
            "melting temperature of {0}", "How hot must it be for {0} to melt?",
        )),
        Family("boiling", (ELEMENTS,), (
            "What is the boiling point of {0}?", "At what temperature does {0} boil?",
            "boiling temperature of {0}", "How hot must it be for {0} to boil?",
        )),
        Family("units", (UNITS,), (
            "How many {0}?", "What is the number of {0}?", "Tell me how many {0} there are.", "number of {0}",
        )),
        Family("release", (SOFTWARE, VERSIONS), (
            "When was {0} {1} released?", "What is the release date of {0} {1}?", "{0} {1} release date",
            "On which day did {0} {1} come out?", "Tell me when version {1} of {0} came out.",
        )),
        Family("celsius", (NUMBERS,), (
            "What is {0} degrees Celsius in Fahrenheit?", "Convert {0} C to F.",
            "{0} degrees Celsius to Fahrenheit", "How many degrees Fahrenheit are {0} degrees Celsius?",
        )),
        Family("fahrenheit", (NUMBERS,), (
            "What is {0} degrees Fahrenheit in Celsius?", "Convert {0} F to C.",
            "{0} degrees Fahrenheit to Celsius", "How many degrees Celsius are {0} degrees Fahrenheit?",
        )),
    ),
    "chat": (
        Family("sorry", (WHO, WHAT), (
            "How do I apologise to {0} for {1}?", "What should I say to {0} after {1}? I want to apologise.",
            "Help me say sorry to {0} for {1}.", "I need to apologise to {0} for {1}, any advice?",
            "Write a short apology to {0} for {1}.",
        )),
        Family("start", (HOBBIES,), (
            "Should I start {0}?", "Is it a good idea for me to take up {0}?",
            "Would you recommend starting {0}?",
            "I think about starting {0}. Should I?",
        )),
        Family("stop", (HOBBIES,), (
            "Should I not start {0}?", "Is it a bad idea for me to take up {0}?",
            "Would you advise against starting {0}?", "Why should I not take up {0}?",
        )),
        Family("dish", (DISHES, ["two", "four", "six", "ten"]), (
            "How do I make {0} for {1} people?", "Give me a recipe for {0} for {1}.",
            "I want to cook {0} for {1} people, how does it go?", "recipe for {0}, {1} servings",
        )),
        Family("without", (DISHES, ["eggs", "milk", "salt", "garlic"]), (
            "How do I make {0} without {1}?", "Give me a recipe for {0} without {1}.",
            "I want to cook {0} but no {1}, how does it go?", "recipe for {0} with no {1}",
        )),
    ),
    "live": (
        Family("stock", (TICKERS,), (
            "What is the price of {0} stock now?", "How much is {0} trading at right now?",
            "current share price of {0}", "Tell me the {0} stock price at the moment.",
        )),
        Family("weather", (CITIES,), (
            "What is the weather in {0} today?", "How is the weather in {0} right now?",
            "current weather in {0}", "Is it raining in {0} now? Tell me today's weather.",
        )),
        Family("coin", (COINS, ["dollars", "euros"]), (
            "What is the price of {0} in {1} now?", "How much is {0} in {1} right now?",
            "current {0} price in {1}", "Tell me what {0} costs in {1} at the moment.",
        )),
    ),
    "sensitive": (
        Family("dose", (DRUGS, PATIENTS), (
            "What is the maximum daily dose of {0} for {1}?", "How much {0} may {1} take per day at most?",
            "highest daily {0} dose for {1}", "Tell me the daily limit of {0} for {1}.",
        )),
        Family("safe", (DRUGS, PATIENTS), (
            "Is {0} safe for {1}?", "Can {1} take {0} safely?", "Is it safe when {1} take {0}?",
            "safety of {0} for {1}",
        )),
        Family("unsafe", (DRUGS, PATIENTS), (
            "When is {0} not safe for {1}?", "In which cases can {1} not take {0}?",
            "When should {1} not take {0}?", "reasons why {1} must not take {0}",
        )),
        Family("notice", (CONTRACTS, TERMS), (
            "Can I end {0} with a notice of {1}?", "Is a notice period of {1} enough to cancel {0}?",
            "May I terminate {0} giving {1} notice?", "cancel {0} with {1} notice, is that allowed?",
        )),
    ),
}  # fmt: skip
FRAMES = (
    "{}", "{}", "{}", "{}", "Hi, {}", "Please: {}", "Quick question: {}", "{} Thanks!", "{} Please be brief.",
    "I was wondering: {}",
)  # fmt: skip
CODE_FRAMES = (
    "How do I {} in Python?", "In Python, how can I {}?", "Python: {}", "Which function do I call to {}?",
    "Show me how to {} with the standard library.", "I need to {}. What is the way in Python?",
)  # fmt: skip
CODE_VERBS = {
    "return": ("return", "get", "obtain"), "create": ("create", "make"), "remove": ("remove", "delete"),
    "open": ("open",), "read": ("read",), "write": ("write",), "convert": ("convert", "turn"),
    "check": ("check", "test"), "test": ("test", "check"), "set": ("set",), "send": ("send",),
    "get": ("get", "fetch"), "find": ("find", "look up"), "parse": ("parse",), "encode": ("encode",),
    "decode": ("decode",), "copy": ("copy",), "print": ("print", "show"), "add": ("add",), "list": ("list",),
    "compute": ("compute", "calculate"), "delete": ("delete", "remove"), "close": ("close",),
    "start": ("start",),
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """``intent`` says which answers are right; of ``live`` only those of one period, ``at_s`` // 300 s."""

    text: str
    category: str
    intent: str
    at_s: float

    @property
    def truth(self) -> str:
        """The right answer."""
        if self.category != "live":
            return self.intent
        return f"{self.intent} @{int(self.at_s // LIVE_PERIOD_S)}"


def _half(text: str) -> Half:
    return "test" if hashlib.sha256(text.encode()).digest()[0] % 2 else "calibrate"


@cache
def docstring_sentences() -> tuple[str, ...]:
    """First sentences, in the imperative, of functions of Python's standard library."""
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef):
                continue
            first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            sentence = re.split(r"(?<=[a-z)])\. |\.$", first)[0]
            verb = sentence.split(" ")[0].lower()
            if verb in CODE_VERBS and 25 <= len(sentence) <= 110:
                found[sentence[0].lower() + sentence[1:]] = None
    return tuple(found)


def intents(category: str, half: Half, seed: int = SEED) -> list[tuple[str, tuple[str, ...]]]:
    """(intent, its wordings without frames) of one half; at most ``INTENTS``, in an order the seed gives."""
    found = list(_code(half)) if category == "code" else list(_templates(category, half))
    order = np.random.default_rng([seed, CATEGORIES.index(category)]).permutation(len(found))
    return [found[i] for i in order[:INTENTS]]


def _code(half: Half) -> Iterator[tuple[str, tuple[str, ...]]]:
    for sentence in docstring_sentences():
        if _half(sentence) == half:
            verb, _, rest = sentence.partition(" ")
            words = [f"{v} {rest}" for v in CODE_VERBS[verb]]
            yield sentence, tuple(f.format(w) for f, w in itertools.product(CODE_FRAMES, words))


def _templates(category: str, half: Half) -> Iterator[tuple[str, tuple[str, ...]]]:
    for family in FAMILIES[category]:
        for values in itertools.product(*family.slots):
            name = f"{family.name}({', '.join(values)})"
            if _half(name) == half:
                yield name, tuple(variant.format(*values) for variant in family.variants)


def replay(n: int, half: Half, seed: int = SEED, duration_s: float = 3600.0) -> list[Request]:
    """``n`` requests over ``duration_s``: Zipf repetition (exponent 1.1) for code, mild (0.7) for reference
    and live, uniform for the others."""
    rng = np.random.default_rng([seed, 0 if half == "calibrate" else 1])
    skew = {"code": 1.1, "reference": 0.7, "live": 0.7}
    pools, chances = {}, {}
    for category in CATEGORIES:
        pools[category] = intents(category, half, seed)
        weight = (1.0 + np.arange(len(pools[category]))) ** -skew.get(category, 0.0)
        chances[category] = weight / weight.sum()
    names = list(SHARES)
    which = rng.choice(len(names), n, p=list(SHARES.values()))
    times = np.sort(rng.uniform(0, duration_s, n))
    out = []
    for kind, at_s in zip(which, times, strict=True):
        category = names[kind]
        intent, wordings = pools[category][int(rng.choice(len(chances[category]), p=chances[category]))]
        # the plain wording comes again and again, the others now and then
        place = 0 if rng.random() < 0.3 else int(rng.integers(len(wordings)))
        frame = FRAMES[int(rng.integers(len(FRAMES)))]
        out.append(Request(_framed(frame, wordings[place]), category, intent, float(at_s)))
    return out


def _framed(frame: str, text: str) -> str:
    if not frame.startswith("{}"):
        text = (
            text[0].lower() + text[1:] if text[:2].istitle() and text.split(" ")[0] not in COUNTRIES else text
        )
    return frame.format(text)


def examples(category: str, n: int = 50, seed: int = SEED) -> list[str]:
    """Training examples of a category for a classifier, from the calibration half."""
    rng = np.random.default_rng([seed, 7, CATEGORIES.index(category)])
    pool = intents(category, "calibrate", seed)
    return [
        words[int(rng.integers(len(words)))]
        for _, words in (pool[int(i)] for i in rng.integers(len(pool), size=n))
    ]
