"""`kind:arg:key=value` strings, with the quoting of Twisted's strports."""

from __future__ import annotations

from dataclasses import dataclass

from popdrop.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Spec:
    """One parsed string: `mbox:/var/mail/{user}:locks=fcntl` has one argument, one keyword."""

    kind: str
    args: tuple[str, ...]
    kwargs: dict[str, str]


def quoted(text: str) -> str:
    """`text` as one argument of a string, whatever it holds."""
    for character in ("\\", ":", "="):
        text = text.replace(character, "\\" + character)
    return text


def parse(option: str, text: str) -> Spec:
    r"""Split `text`, given for `option`, at colons; `\` makes the next character literal.

    As strports, an argument is a keyword where it holds an unquoted `=`. Raises `ConfigError`.
    """
    fields: list[tuple[str | None, str]] = []
    key: str | None = None
    word: list[str] = []
    characters = iter(text)
    for character in characters:
        if character == "\\":
            literal = next(characters, None)
            if literal is None:
                raise ConfigError(f"{option} {text}: a backslash at the end quotes nothing")
            word.append(literal)
        elif character == ":":
            fields.append((key, "".join(word)))
            key, word = None, []
        elif character == "=" and key is None:
            key, word = "".join(word), []
        else:
            word.append(character)
    fields.append((key, "".join(word)))
    if fields[0][0] is not None or not fields[0][1]:
        raise ConfigError(f"{option} {text}: begin with a kind and a colon, as in kind:argument")
    kwargs: dict[str, str] = {}
    for name, value in fields[1:]:
        if name is None:
            continue
        if name in kwargs:
            raise ConfigError(f"{option} {text}: {name}= is given twice")
        kwargs[name] = value
    return Spec(fields[0][1], tuple(v for k, v in fields[1:] if k is None), kwargs)
