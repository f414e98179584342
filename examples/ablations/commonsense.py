"""Turn the commonsense files of LLM-Adapters into rows for llm-commonsense.toml.

Get commonsense_170k.json (in ft-training_set) and the folder dataset of the GitHub repository
AGI-Edgerunners/LLM-Adapters, read the licences of the eight data sets, and run

    python examples/ablations/commonsense.py commonsense_170k.json dataset/{boolq,piqa,social_i_qa,\
hellaswag,winogrande,ARC-Easy,ARC-Challenge,openbookqa}/test.json --out FOLDER

It writes FOLDER/commonsense/{train,validation,test}.jsonl with the columns prompt and target.
Validation rows come from the training file, and no training row has the prompt of one. Every test
file gives the same number of rows, so that a share of all of them is the mean over the eight.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path


def convert(row: dict[str, str]) -> dict[str, str]:
    """Return the prompt, which ends where the answer begins, and the answer."""
    parts = [f"### Instruction:\n{row['instruction'].strip()}"]
    if row.get("input", "").strip():
        parts.append(f"### Input:\n{row['input'].strip()}")
    return {"prompt": "\n\n".join([*parts, "### Response:\n"]), "target": row["output"].strip()}


def read(path: Path) -> list[dict[str, str]]:
    """Read a JSON file of rows in a fixed random order."""
    rows = [convert(row) for row in json.loads(path.read_text(encoding="utf-8"))]
    return random.Random(0).sample(rows, len(rows))


def write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows):,} rows")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--validation-rows", type=int, default=1000)
    parser.add_argument("--test-rows", type=int, default=500, help="of each file")
    args = parser.parse_args(arguments)
    rows = read(args.train)
    validation = rows[: args.validation_rows]
    held_out = {row["prompt"] for row in validation}
    train = [row for row in rows if row["prompt"] not in held_out]
    test = [row for path in args.test for row in read(path)[: args.test_rows]]
    for name, split in {"train": train, "validation": validation, "test": test}.items():
        write(args.out / "commonsense" / f"{name}.jsonl", split)


if __name__ == "__main__":
    main()
