"""Prints which resources and data sources the .tf files below a folder name, as schema.js takes them, each with its provider's name before it."""

import pathlib
import sys

import hcl2


def named(path):
    """The types in one file: "aws aws_eks_cluster", and "aws data.aws_partition" for a data source's."""
    with path.open(encoding="utf-8") as file:
        parsed = hcl2.load(file)
    for kind, before in (("resource", ""), ("data", "data.")):
        for block in parsed.get(kind, []):
            for name in block:
                yield f"{name.split('_')[0]} {before}{name}"


def main(folder):
    found = {line for path in pathlib.Path(folder).rglob("*.tf") for line in named(path)}
    print("\n".join(sorted(found)))


if __name__ == "__main__":
    main(sys.argv[1])
