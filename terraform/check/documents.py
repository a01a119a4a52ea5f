"""Keeps the tables of inputs and outputs in the modules' README.md: says which are not what the .tf files say, and writes them with --write."""

import json
import pathlib
import sys

import hcl2

BEGIN, END = "<!-- written by check/documents.py -->\n", "<!-- until here -->\n"


def parsed(folder, file):
    with (folder / file).open(encoding="utf-8") as text:
        return hcl2.load(text)


def first(value):
    """What this parser puts into lists of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def shown(variable):
    """A variable's default, as JSON."""
    if "default" not in variable:
        return "required"
    value = variable["default"]
    if value == "":
        return "empty"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def tables(folder):
    lines = ["| Input | Default | |\n", "|---|---|---|\n"]
    for block in parsed(folder, "variables.tf")["variable"]:
        for name, variable in block.items():
            lines.append(f"| `{name}` | {shown(variable)} | {first(variable['description'])} |\n")
    lines += ["\n", "| Output | |\n", "|---|---|\n"]
    for block in parsed(folder, "outputs.tf")["output"]:
        for name, output in block.items():
            lines.append(f"| `{name}` | {first(output['description'])} |\n")
    return "".join(lines)


def main(modules, write):
    wrong = 0
    for folder in sorted(path.parent for path in pathlib.Path(modules).glob("*/variables.tf")):
        readme = folder / "README.md"
        before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
        written, _, after = rest.partition(END)
        if write:
            readme.write_text(before + BEGIN + tables(folder) + END + after, encoding="utf-8")
        elif written != tables(folder):
            print(f"{readme} is not what the module has: run check.sh --write", file=sys.stderr)
            wrong += 1
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], "--write" in sys.argv))
