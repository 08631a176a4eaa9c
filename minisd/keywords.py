"""The flags of train.py as keywords of a function. Standard library only."""

from typing import NoReturn

from minisd import cli, registry
from minisd.options import Run
from minisd.spelling import SPELLED


class Keywords(cli.Parser):
    """What is wrong is a ValueError: the program that called goes on."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.where}{message}")


def options(method: str, flags: dict[str, object]) -> Run:
    """The Options of a method by its flags, in any of their spellings; None stands for a default. ValueError,
    naming the flag, if they are wrong."""
    SPELLED.clear()
    cls = cli.options_of(method)
    parser = cli.parser_of(cls, "minisd.train", "", Keywords)
    parser.methods = registry.names("methods")
    values = parser.read_values("", cls, flags)
    return parser.build(cls, values | parser.read([]), method)  # which says what is missing
