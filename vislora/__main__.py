"""python -m vislora: the commands there are."""

import ast
from pathlib import Path

from vislora.compose import tell
from vislora.paths import CONF


def main() -> None:
    """Print the first line of every command's file, which shows how it is called."""
    lines = []
    for config in sorted(CONF.glob("*.yaml")):
        source = Path(__file__).with_name(f"{config.stem}.py").read_text(encoding="utf-8")
        lines.append(ast.get_docstring(ast.parse(source)).splitlines()[0])
    tell("\n".join([*lines, "\nEach tells more with --help, and prints its settings with --cfg job."]))


if __name__ == "__main__":
    main()
