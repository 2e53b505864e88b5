"""Makes a notebook of an example in the form of keras.io: text in docstrings at the top level, and code between them.

python examples/keras_io/to_notebook.py                # writes ddpm_flowers.ipynb to the current folder
python examples/keras_io/to_notebook.py notebook.ipynb
"""

import ast
import json
import pathlib
import re
import sys

SOURCE = pathlib.Path(__file__).parent / "ddpm_flowers.py"


def header(text):
    """The entries of the first docstring, by name."""
    return dict(line.split(": ", 1) for line in text.strip().splitlines())


def blocks(source):
    """Yields the kind of each part of an example, "header", "text", "shell" or "code", and its lines."""
    lines, start = source.splitlines(), 0
    for node in [*ast.parse(source).body, None]:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if node is None or is_text:
            code = "\n".join(lines[start : node.lineno - 1 if node else None]).strip("\n")
            if code:
                yield "code", code
        if is_text:
            kind, text = re.fullmatch(r"(shell)?\n(.*)\n", node.value.value, re.DOTALL).groups()
            yield kind or ("text" if start else "header"), text
            start = node.end_lineno


def notebook(source):
    """The notebook of an example, as a dict."""
    cells = []
    for number, (kind, text) in enumerate(blocks(source)):
        if kind == "header":
            entries = header(text)
            text = f"# {entries.pop('Title')}\n\n" + "<br>\n".join(f"**{k}:** {v}" for k, v in entries.items())
        if kind == "shell":
            text = "\n".join(f"!{line}" for line in text.splitlines())
        cell = {"id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        is_code = kind in ("code", "shell")
        more = {"cell_type": "code", "execution_count": None, "outputs": []} if is_code else {"cell_type": "markdown"}
        cells.append(cell | more)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    path = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else f"{SOURCE.stem}.ipynb")
    path.write_text(json.dumps(notebook(SOURCE.read_text()), indent=1, ensure_ascii=False) + "\n")
    print(f"Wrote {path}.")
