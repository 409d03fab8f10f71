"""Texts that hardly describe any picture: generated from a seed, for calibrating relevance.

Searches by texts that nothing in a collection can match show how high unrelated texts score there.
A query may be foreign in many ways, so there are many kinds, each a small grammar: noise (letters,
invented words, codes, numbers), words that were drawn at random, and sentences of subjects that are
no sight: law, medicine, finance, software, grammar, politics. None is taken from a data set.
"""

from __future__ import annotations

import random

_CONSONANTS, _VOWELS = "bcdfghjklmnpqrstvwz", "aeiou"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CODE = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"

_NOUNS = """
    agreement allowance amendment analysis argument assembly assumption audit balance bandwidth
    bargain belief benefit bias budget capacity census charter clause climate coalition commission
    compiler concept consent contract credit culture currency custom deadline debate decree deficit
    demand democracy diagnosis dialect diploma discount doctrine duty economy election embargo
    employer endowment entropy equation essay estimate ethics evidence exemption export faculty
    federation fiction fluctuation forecast formula franchise freedom frequency grammar guarantee
    habit heritage hypothesis idiom immunity import income index inflation inheritance inquiry
    insurance integral interest interval invoice jargon journal judgment justice kernel ledger
    legislation leisure lemma liability licence literacy loan logic loyalty mandate margin matrix
    memory merger metaphor method migration minority molecule monopoly morality mortgage motive
    myth negligence network norm notion oath obligation offset opinion orbit outcome overhead
    paradox parameter patent payment pension permit phase philosophy policy premium principle
    privilege probability procedure profit protocol proverb quarter quota ratio reaction rebate
    reform regime remedy rent republic reserve revenue rhetoric royalty ruling salary sanction
    schedule semester sequence share signature statistic statute stock strategy subsidy suffix
    surplus survey syllabus symptom syntax tariff tax tenure testimony theorem theory therapy
    threshold tradition treaty trend tribunal trust tuition turnover unit upgrade vaccine validity
    variable velocity verdict version vocabulary voltage vote voucher wage warranty wisdom
    yield
"""
_ADJECTIVES = """
    abstract academic annual average biological chemical civil clinical commercial constitutional
    critical cumulative digital domestic economic electronic ethical federal fiscal formal foreign
    genetic global historical implicit industrial internal judicial legal linear logical marginal
    medical mental monetary moral national nominal nuclear obsolete optional organic partial
    political preliminary private provisional public quarterly random rational regional relative
    residual seasonal secondary social spiritual statistical strategic structural tentative
    theoretical urban verbal virtual voluntary
"""
_VERBS = """
    accept adjust announce apply approve argue assume calculate cancel clarify combine compare
    conclude confirm criticise define delay deny deserve determine discuss doubt estimate exceed
    exclude expire explain extend forbid guarantee imply improve infer inherit interpret justify
    mention negotiate neglect oppose overlook postpone predict prove publish question recall
    recommend reduce refund regret reject renew replace resolve revise simplify suspend translate
    undermine update validate verify violate withdraw
"""
_PLACES = """
    Geneva Nairobi Lima Oslo Ankara Hanoi Quito Dublin Warsaw Accra Ottawa Jakarta Riga
    Montevideo
"""
_MONTHS = "January March April June August October November"
_PATTERNS = """
    what is the {a} {n} of the {n2}
    the {a} court will {v} the {n} in {m}
    how to {v} a {n} without a {n2}
    we {v} that the {a} {n} does not {v2} any {n2}
    please {v} your {n} before the {d}th of {m}
    error {d}: the {n} could not {v} the {n2}
    minutes of the {a} {n} committee, {m} {y}
    the {n} of {n2} rose by {d} percent in {y}
    an introduction to {a} {n} and {n2}
    {p} is the capital where the {n} was signed in {y}
    the patient shows a {a} {n} after {d} days
    if the {n} is {a}, the {n2} tends to {v}
    def {n}({n2}): return {n2} + {d}
    select {n} from {n2} where {v} = {d}
    chapter {d}: the {a} {n}
    why did they {v} the {n} and not the {n2}
    {n} versus {n2}: which is more {a}
    terms and conditions of the {a} {n}
    he said that nobody would {v} the {n} again
    a {a} theory of {n}
    the verb {v} is followed by a {n}
    breaking news: {p} to {v} {a} {n}
    {a} {n} for beginners, {d}th edition
    my {n} is due tomorrow, can you {v} it
    the {n}
    {a} {n}
    {n} {n2}
    {v} the {n}
"""


def foreign_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of all kinds in turn: the same ones for a count and a seed, the first ones of more."""
    grammar = _Grammar(random.Random(seed))
    kinds = (
        grammar.letters,
        grammar.invented,
        grammar.code,
        grammar.drawn_words,
        grammar.sentence,
        grammar.sentence,
    )
    return [kinds[number % len(kinds)]() for number in range(count)]


class _Grammar:
    """Draws texts of each kind."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._nouns, self._adjectives, self._verbs = (
            words.split() for words in (_NOUNS, _ADJECTIVES, _VERBS)
        )
        self._places, self._months = _PLACES.split(), _MONTHS.split()
        self._patterns = [line.strip() for line in _PATTERNS.strip().splitlines()]

    def letters(self) -> str:
        rng = self._rng
        alphabet = _LETTERS + " " * rng.choice((0, 2, 5))
        drawn = "".join(rng.choice(alphabet) for _ in range(rng.randint(4, 24)))
        return " ".join(drawn.split()) or rng.choice(_LETTERS)

    def invented(self) -> str:
        return " ".join(self._invented_word() for _ in range(self._rng.randint(1, 6)))

    def _invented_word(self) -> str:
        rng = self._rng
        return "".join(
            rng.choice(_CONSONANTS) + rng.choice(_VOWELS) + rng.choice(("", "", "n", "r", "x"))
            for _ in range(rng.randint(1, 4))
        )

    def code(self) -> str:
        rng = self._rng
        code = "".join(rng.choice(_CODE) for _ in range(rng.randint(3, 12)))
        noun = rng.choice(self._nouns)
        return rng.choice(
            (
                code,
                f"{code[:3]}-{rng.randint(10, 99_999)}",
                f"{rng.randint(1, 28)} {rng.choice(self._months)} {rng.randint(1700, 2030)}",
                f"{rng.randint(1, 9_999)}.{rng.randint(0, 99):02} + {rng.randint(1, 999)}",
                f"https://www.{self._invented_word()}.org/{noun}",
                f"{noun}_{rng.randint(0, 99)}.{rng.choice(('txt', 'zip', 'csv'))}",
                f"tel. {rng.randint(100, 999)} {rng.randint(1000, 9999)}",
            )
        )

    def drawn_words(self) -> str:
        words = [*self._nouns, *self._adjectives, *self._verbs]
        return " ".join(self._rng.choice(words) for _ in range(self._rng.randint(1, 8)))

    def sentence(self) -> str:
        rng = self._rng
        return rng.choice(self._patterns).format(
            a=rng.choice(self._adjectives),
            n=rng.choice(self._nouns),
            n2=rng.choice(self._nouns),
            v=rng.choice(self._verbs),
            v2=rng.choice(self._verbs),
            p=rng.choice(self._places),
            m=rng.choice(self._months),
            y=rng.randint(1800, 2030),
            d=rng.randint(4, 19),
        )
