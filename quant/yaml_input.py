"""Parses YAML that anyone may have written: plain lists, mappings and texts, without aliases."""

from __future__ import annotations

from functools import cache
from typing import Any

from quant.quoted import quoted


class YamlError(ValueError):
    """The text is no YAML that EdgeForge reads; the message follows the text's name.

    Attributes:
        is_syntax: whether it is no YAML at all, and not YAML that EdgeForge does not take.
    """

    is_syntax = False


def parse_yaml(content: bytes) -> object:
    """Parses a YAML document of lists, mappings and scalars.

    Every scalar stays the text that is written: a date, a number or ``yes`` is what it looks like.
    Aliases are refused, because a few lines of them stand for gigabytes.

    Raises:
        YamlError: the text is not UTF-8 or not YAML, is nested too deep, has an alias or a tag, or
            a key that occurs twice in one mapping.

    >>> parse_yaml(b"- {match: '*', format: int4-g32}")
    [{'match': '*', 'format': 'int4-g32'}]
    """
    import yaml

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError(f"is not UTF-8 text: {error.reason}") from None
    try:
        return yaml.load(text, _loader())
    except RecursionError:
        raise YamlError("is not YAML that EdgeForge reads: it is nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        if isinstance(error, yaml.constructor.ConstructorError):
            raise YamlError(f"cannot be read{where}: {problem}") from None
        found = YamlError(f"is not YAML{where} ({problem})")
        found.is_syntax = True
        raise found from None


@cache
def _loader() -> Any:  # a class that exists only once yaml is imported
    import yaml

    base: Any = yaml.BaseLoader  # its methods have no types
    refusal: Any = yaml.constructor.ConstructorError

    class PlainLoader(base):  # type: ignore[misc]
        """Reads scalars as text; refuses aliases, tags and repeated keys."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent):
                problem = f"{quoted(event.anchor)} is an alias; write what it stands for, and put "
                problem += "names that begin with a star in quotes"
                raise refusal(None, None, problem, event.start_mark)
            tag = getattr(event, "tag", None)
            if tag is not None:
                problem = f"the tag {quoted(tag)} is not read"
                raise refusal(None, None, problem, event.start_mark)
            return super().compose_node(parent, index)

        def construct_scalar(self, node: Any) -> str:
            text = str(super().construct_scalar(node))
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                problem = "it holds half of a surrogate pair, which is no text"
                raise refusal(None, None, problem, node.start_mark)
            return text

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, object]:
            found: dict[str, object] = {}
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    problem = "a key is a list or a mapping, not a text"
                    raise refusal(None, None, problem, key.start_mark)
                name = self.construct_scalar(key)
                if name in found:
                    problem = f"the key {quoted(name)} occurs twice"
                    raise refusal(None, None, problem, key.start_mark)
                found[name] = self.construct_object(value, deep=True)
            return found

    return PlainLoader
