"""Questions, their worked steps and their answers.

Six kinds: addition and subtraction of up to three digits, products of up to two, comparing, sorting
and counting. The steps are made to be computed one token at a time: every number is written again at
a fixed width, every digit stands alone, and each line needs only what the lines above it show.

A problem is trained on or held out, never both: `is_held_out` hashes what is asked about (the kind and
the numbers in rising order, without wording), so that no phrasing, order or thinking mode of a
held-out problem is in the training data.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

KINDS = ("addition", "subtraction", "multiplication", "comparing", "sorting", "counting")

HELD_OUT_SHARE = 10  # one problem in ten


@dataclass(frozen=True)
class Question:
    """One question with everything there is to know about it."""

    kind: str
    problem: str  # what is asked about, whatever the wording; decides the split
    prompt: str
    steps: str  # what stands between <think> and </think>
    answer: str

    def completion(self, thinking: bool) -> str:
        """The assistant's turn, without the token that ends it."""
        boxed = f"\\boxed{{{self.answer}}}"
        return f"<think>\n{self.steps}\n</think>\n\n{boxed}" if thinking else boxed


def is_held_out(problem: str) -> bool:
    """Whether a problem is kept for evaluation."""
    digest = hashlib.sha256(problem.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_SHARE == 0


def sample(kind: str, rng: random.Random, held_out: bool, full_size: bool = False) -> Question:
    """A question of this side of the split; `full_size` leaves out numbers shorter than the kind is about."""
    while True:
        question = MAKERS[kind](rng, full_size)
        if is_held_out(question.problem) == held_out:
            return question


def held_out_questions(count: int, seed: int) -> list[Question]:
    """Distinct held-out problems of full size, kinds in turn."""
    rng, seen, questions = random.Random(seed), set(), []
    while len(questions) < count:
        question = sample(KINDS[len(questions) % len(KINDS)], rng, held_out=True, full_size=True)
        if question.problem not in seen:
            seen.add(question.problem)
            questions.append(question)
    return questions


# ---------------------------------------------------------------------------------- numbers


def number(rng: random.Random, digits: int, full_size: bool) -> int:
    """A number of that many digits, now and then of fewer."""
    if not full_size and rng.random() < 0.2:
        digits = rng.randint(1, digits)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def problem_of(kind: str, numbers: list[int]) -> str:
    """A problem's name: its numbers in rising order, so that turning them round makes no new problem."""
    return " ".join([kind, *map(str, sorted(numbers))])


def listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def padded(numbers: list[int]) -> str:
    """A list at two digits a number."""
    return ",".join(f"{n:02}" for n in numbers)


# -------------------------------------------------------------------------------- arithmetic

ADDITION = (
    "What is {a} + {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "Compute {a} + {b}.",
    "How much is {a} plus {b}?",
    "Anna has {a} coins and finds {b} more. How many coins does she have now?",
    "A shelf holds {a} books, another {b}. How many books is that in all?",
)

SUBTRACTION = (
    "What is {a} - {b}?",
    "Subtract {b} from {a}.",
    "What is the difference of {a} and {b}?",
    "Compute {a} - {b}.",
    "How much is {a} minus {b}?",
    "Anna has {a} coins and spends {b}. How many coins are left?",
    "A train has {a} seats, {b} of them are taken. How many are free?",
)

MULTIPLICATION = (
    "What is {a} * {b}?",
    "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
    "Compute {a} * {b}.",
    "How much is {a} times {b}?",
    "A box holds {a} pens. How many pens are in {b} boxes?",
    "A hall has {a} rows of {b} seats. How many seats is that?",
)


def add_columns(a: str, b: str) -> tuple[list[str], str]:
    """Lines `digit+digit+carry=sum` from the right, and the sum at one digit more than its operands."""
    lines, digits, carry = [], "", 0
    for x, y in zip(reversed(a), reversed(b)):
        total = int(x) + int(y) + carry
        lines.append(f"{x}+{y}+{carry}={total:02}")
        carry, digits = total // 10, str(total % 10) + digits
    return lines, str(carry) + digits


def subtract_columns(a: str, b: str) -> tuple[list[str], str]:
    """Lines `digit-digit-borrow=digit b borrow` from the right, and the difference."""
    lines, digits, borrow = [], "", 0
    for x, y in zip(reversed(a), reversed(b)):
        total = int(x) - int(y) - borrow
        lines.append(f"{x}-{y}-{borrow}={total % 10}b{int(total < 0)}")
        borrow, digits = int(total < 0), str(total % 10) + digits
    return lines, digits


def times_digit(a: str, digit: str) -> tuple[list[str], str]:
    """Lines `digit*digit+carry=product` from the right, and the product at one digit more than `a`."""
    lines, digits, carry = [], "", 0
    for x in reversed(a):
        total = int(x) * int(digit) + carry
        lines.append(f"{x}*{digit}+{carry}={total:02}")
        carry, digits = total // 10, str(total % 10) + digits
    return lines, str(carry) + digits


def addition(rng: random.Random, full_size: bool) -> Question:
    a, b = number(rng, 3, full_size), number(rng, 3, full_size)
    lines, total = add_columns(f"{a:03}", f"{b:03}")
    steps = "\n".join([f"{a:03}+{b:03}", *lines, total])
    prompt = rng.choice(ADDITION).format(a=a, b=b)
    return Question("addition", problem_of("addition", [a, b]), prompt, steps, str(a + b))


def subtraction(rng: random.Random, full_size: bool) -> Question:
    a, b = sorted((number(rng, 3, full_size), number(rng, 3, full_size)), reverse=True)
    lines, difference = subtract_columns(f"{a:03}", f"{b:03}")
    steps = "\n".join([f"{a:03}-{b:03}", *lines, difference])
    prompt = rng.choice(SUBTRACTION).format(a=a, b=b)
    return Question("subtraction", problem_of("subtraction", [a, b]), prompt, steps, str(a - b))


def multiplication(rng: random.Random, full_size: bool) -> Question:
    a, b = number(rng, 2, full_size), number(rng, 2, full_size)
    ones_lines, ones = times_digit(f"{a:02}", f"{b:02}"[1])
    tens_lines, tens = times_digit(f"{a:02}", f"{b:02}"[0])
    # The last digit of a sum with `tens` shifted by one place is that of `ones`.
    sum_lines, total = add_columns("0" + ones[:2], tens)
    lines = [f"{a:02}*{b:02}", *ones_lines, *tens_lines, f"{ones}+{tens}0", *sum_lines, total[1:] + ones[2]]
    prompt = rng.choice(MULTIPLICATION).format(a=a, b=b)
    return Question("multiplication", problem_of("multiplication", [a, b]), prompt, "\n".join(lines), str(a * b))


# --------------------------------------------------------------------------------- comparing

LARGER = (
    "Which is larger, {a} or {b}?",
    "Which number is greater: {a} or {b}?",
    "What is the maximum of {a} and {b}?",
    "Anna has {a} coins and Ben has {b}. How many does the richer one have?",
)

IS_LARGER = ("Is {a} larger than {b}?", "Is {a} greater than {b}?")


def comparing(rng: random.Random, full_size: bool) -> Question:
    a = number(rng, 3, full_size)
    b = near(rng, a) if rng.random() < 0.5 else number(rng, 3, full_size)
    while b == a:
        b = number(rng, 3, full_size)
    if rng.random() < 0.7:
        phrasings, answer = LARGER, max(a, b)
    else:
        phrasings, answer = IS_LARGER, "yes" if a > b else "no"
    prompt = rng.choice(phrasings).format(a=a, b=b)
    steps = "\n".join([f"{a:03},{b:03}", *compare_digits(f"{a:03}", f"{b:03}")])
    return Question("comparing", problem_of("comparing", [a, b]), prompt, steps, str(answer))


def near(rng: random.Random, a: int) -> int:
    """A number that shares leading digits with `a`."""
    place = rng.choice((10, 100)) if a >= 100 else 10
    low = max(a // place * place, 10 ** (len(str(a)) - 1))
    return rng.randint(low, a // place * place + place - 1)


def compare_digits(a: str, b: str) -> list[str]:
    """Lines `digit sign digit` from the left, up to the first that differ."""
    lines = []
    for x, y in zip(a, b):
        lines.append(f"{x}{'=' if x == y else '<' if x < y else '>'}{y}")
        if x != y:
            break
    return lines


# ----------------------------------------------------------------------------------- sorting

ASCENDING = (
    "Sort {list}.",
    "Sort {list} in ascending order.",
    "Put {list} in order, smallest first.",
    "Write {list} from smallest to largest.",
    "Order these numbers from low to high: {list}.",
)

DESCENDING = (
    "Sort {list} in descending order.",
    "Put {list} in order, largest first.",
    "Write {list} from largest to smallest.",
)


def sorting(rng: random.Random, full_size: bool) -> Question:
    numbers = distinct_numbers(rng, rng.randint(4 if full_size else 2, 6))
    descending = rng.random() < 0.3
    answer = sorted(numbers, reverse=descending)
    prompt = rng.choice(DESCENDING if descending else ASCENDING).format(list=listed(numbers))
    steps = "\n".join([padded(numbers), *stems_and_leaves(answer)])
    return Question("sorting", problem_of("sorting", numbers), prompt, steps, listed(answer))


def distinct_numbers(rng: random.Random, count: int) -> list[int]:
    return rng.sample(range(1, 100), count)


def stems_and_leaves(ordered: list[int]) -> list[str]:
    """A line `tens|ones...` for each tens digit that there is, in the order of the list."""
    leaves: dict[int, str] = {}
    for n in ordered:
        leaves[n // 10] = leaves.get(n // 10, "") + str(n % 10)
    return [f"{stem}|{leaf}" for stem, leaf in leaves.items()]


# ---------------------------------------------------------------------------------- counting

COUNTING = (
    "How many of {list} are {what}?",
    "How many numbers in {list} are {what}?",
    "Count the numbers that are {what}: {list}.",
    "In the list {list}, how many are {what}?",
)


def counting(rng: random.Random, full_size: bool) -> Question:
    what, limit, counts = predicate(rng)
    count = rng.randint(4 if full_size else 2, 7)
    numbers = [n for n in distinct_numbers(rng, count + 1) if n != limit][:count]
    marks, tally = [], 0
    for n in numbers:
        tally += counts(n)
        marks.append(f"{n:02}{'y' if counts(n) else 'n'}{tally}")
    prompt = rng.choice(COUNTING).format(list=listed(numbers), what=what)
    steps = ",".join(marks) if limit is None else f">{limit}\n{','.join(marks)}"
    return Question("counting", problem_of("counting", numbers), prompt, steps, str(tally))


def predicate(rng: random.Random):
    """What is counted: in words, the limit it has, and as a function.

    Neither has its opposite here, as comparing asks for no smaller one. Where two things say something
    about the next token only together, as odd and even would with the number's last digit, a model
    this small takes long to find it.
    """
    if rng.random() < 0.65:
        return "even", None, lambda n: n % 2 == 0
    limit = 10 * rng.randint(1, 9)
    return f"larger than {limit}", limit, lambda n: n > limit


MAKERS = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "comparing": comparing,
    "sorting": sorting,
    "counting": counting,
}
