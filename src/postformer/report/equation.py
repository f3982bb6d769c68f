"""Equations for the page: a small linear notation turned into MathML, which browsers typeset without any script.

The notation: `_x` or `_{...}` is a subscript, `^x` or `^{...}` a superscript (both may follow one base), `{...}`
groups, `"..."` is upright text, a word of two or more Latin letters is an upright function name. Everything else is
one symbol per character.
"""

from __future__ import annotations

import html
import re

_TOKEN = re.compile(r'\s*("[^"]*"|[A-Za-z]{2,}|[0-9]+(?:\.[0-9]+)?|.)', re.DOTALL)
_OPERATORS = set("=+−-·∘⊙×/()[],;:←→<>≤≥∈|‖∑∏")


def mathml(text: str) -> str:
    """The equation `text` (notation: this module's docstring) as one MathML element that also carries `text` itself.

    Raises ValueError where braces do not match or a script has no base.
    """
    tokens = [t for t in _TOKEN.findall(text) if t.strip()]
    body, rest = _row(tokens, 0, closing=False)
    assert rest == len(tokens)
    return f'<math display="block" aria-label="{html.escape(text, quote=True)}"><mrow>{body}</mrow></math>'


def _row(tokens: list[str], at: int, closing: bool) -> tuple[str, int]:
    out: list[str] = []
    while at < len(tokens):
        if tokens[at] == "}":
            if not closing:
                raise ValueError("an equation closes a brace that it did not open")
            return "".join(out), at + 1
        base, at = _atom(tokens, at)
        scripts: dict[str, str] = {}
        while at < len(tokens) and tokens[at] in "_^":
            mark = tokens[at]
            if mark in scripts:
                raise ValueError(f"two scripts {mark!r} on one symbol; group the first with braces")
            scripts[mark], at = _atom(tokens, at + 1)
        if len(scripts) == 2:
            out.append(f"<msubsup>{base}{scripts['_']}{scripts['^']}</msubsup>")
        elif "_" in scripts:
            out.append(f"<msub>{base}{scripts['_']}</msub>")
        elif "^" in scripts:
            out.append(f"<msup>{base}{scripts['^']}</msup>")
        else:
            out.append(base)
    if closing:
        raise ValueError("an equation opens a brace that it does not close")
    return "".join(out), at


def _atom(tokens: list[str], at: int) -> tuple[str, int]:
    if at >= len(tokens) or tokens[at] in "_^":
        raise ValueError("a sub- or superscript lacks a base or a body")
    token = tokens[at]
    if token == "{":
        body, at = _row(tokens, at + 1, closing=True)
        return f"<mrow>{body}</mrow>", at
    if token.startswith('"') and len(token) > 1:
        return f"<mtext>{html.escape(token[1:-1])}</mtext>", at + 1
    if token[0].isdigit():
        return f"<mn>{token}</mn>", at + 1
    if token in _OPERATORS:
        stretchy = ' stretchy="false"' if token in "()[]|‖" else ""
        return f"<mo{stretchy}>{html.escape(token)}</mo>", at + 1
    if len(token) > 1:
        return f'<mi mathvariant="normal">{html.escape(token)}</mi>', at + 1
    return f"<mi>{html.escape(token)}</mi>", at + 1
