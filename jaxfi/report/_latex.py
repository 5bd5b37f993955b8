"""Text as LaTeX prints it literally."""

from __future__ import annotations

_COMMANDS = (  # the backslash first: the others bring their own
    ("\\", r"\textbackslash "), *((c, "\\" + c) for c in "_%&#${}"), ("~", r"\textasciitilde "),
    ("^", r"\textasciicircum "), ("α", r"$\alpha$"), ("×", r"$\times$"), ("–", "--"), ("−", "--"),
)  # fmt: skip


def latex_text(text: str) -> str:
    """`text` with LaTeX's special characters, and ours that it does not print, as commands.

    >>> latex_text("α = 5 %")
    '$\\\\alpha$ = 5 \\\\%'
    """
    for character, command in _COMMANDS:
        text = text.replace(character, command)
    return text
