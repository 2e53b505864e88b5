"""Renders equations as MathML, which browsers show without scripts, and the examples in docstrings as code."""

import re

import griffe
import latex2mathml.converter


def on_page_content(html, **kwargs):
    """Called by MkDocs for the HTML of each page. Code is left alone."""
    parts = re.split(r"(<(?:pre|code)\b.*?</(?:pre|code)>)", html, flags=re.DOTALL)
    return "".join(part if index % 2 else _rendered(part) for index, part in enumerate(parts))


def _rendered(html):
    for pattern, display in ((r"\$\$(.+?)\$\$", "block"), (r"\$([^$]+?)\$", "inline")):
        html = re.sub(pattern, lambda found: _mathml(found[1], display), html, flags=re.DOTALL)  # noqa: B023
    return html


def _mathml(latex, display):
    for escaped, character in (("&lt;", "<"), ("&gt;", ">"), ("&amp;", "&"), ("<em>", "_"), ("</em>", "_")):
        latex = latex.replace(escaped, character)
    return latex2mathml.converter.convert(latex, display=display)


class Examples(griffe.Extension):
    """Makes code blocks of the lines in docstrings that start with `>>>` and `...`."""

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            lines = re.sub(r"((?:^(?:>>>|\.\.\.).*\n?)+)", self._block, obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = lines

    def _block(self, found):
        code = re.sub(r"^(?:>>>|\.\.\.) ?", "", found[1], flags=re.MULTILINE)
        return f"\n```python\n{code.rstrip()}\n```\n"
