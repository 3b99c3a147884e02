"""Writes the questions of the quickstart: held-out ones, as plain rows of a job.

    python make_questions.py > ../../../configs/quickstart/questions.jsonl
"""

from __future__ import annotations

import json
from collections import Counter

import questions

COUNT, SEED = 1_000, 2026


def quickstart_rows() -> list[dict]:
    rows, numbers = [], Counter()
    for question in questions.held_out_questions(COUNT, SEED):
        numbers[question.kind] += 1
        row_id = f"{question.kind}-{numbers[question.kind]:03}"
        rows.append({"id": row_id, "kind": question.kind, "prompt": question.prompt, "answer": question.answer})
    return rows


def main() -> None:
    for row in quickstart_rows():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
