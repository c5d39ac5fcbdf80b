"""trl's side: its trainers as they are, in a process of its own, and what their run was.

It runs in a Python that has trl and may lack this project, so that nothing here imports it, but for
`start`, which is called from ours.
"""


class Refused(Exception):
    """What trl's side cannot do, as one line: it becomes the error of ours."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message that says something, or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
