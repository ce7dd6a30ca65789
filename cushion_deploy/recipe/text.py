"""Recipes as YAML text: safe loading into plain Python values, and dumping with descriptions as comments."""

from __future__ import annotations

import io
import re
from typing import Any

from pydantic import BaseModel
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import ConstructorError, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.resolver import VersionedResolver

_WIDTH = 1 << 20
"""Columns before the emitter would fold a value: a folded value is hard to read below its comment."""


class _Resolver(VersionedResolver):
    """The types that PyYAML gives to plain scalars, with which the first recipes were written.

    These are the types of YAML 1.1 (``yes`` and ``on`` are true), whatever a ``%YAML`` directive asks for. ruamel.yaml
    reads more forms as numbers and booleans under YAML 1.1, which PyYAML leaves as text: an exponent without a decimal
    point (``1e-1``) or without a sign (``1.0e5``), an underscore before the first digit, and the letters y and n.
    """

    _TEXT = re.compile(r"[yYnN]|[-+]?[0-9_]+[eE][-+]?[0-9]+|[-+]?[0-9_]*\.[0-9_]*[eE][0-9]+|[-+.]_.*")

    @property
    def processing_version(self) -> tuple[int, int]:
        return (1, 1)

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> Any:
        if kind is ScalarNode and implicit[0] and self._TEXT.fullmatch(value):
            return self.DEFAULT_SCALAR_TAG
        return super().resolve(kind, value, implicit)


class _Constructor(SafeConstructor):
    """Refuses repeated keys and keys that are lists or mappings, before any key is hashed or printed."""

    def flatten_mapping(self, node: MappingNode) -> None:
        # Called for every mapping before it is constructed. The check of ruamel.yaml itself comes later, when keys have
        # been hashed and merge keys (<<) resolved, and prints the values, which aliases can make exponentially large.
        if node.merge is None:
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, ScalarNode):
                    raise ConstructorError(None, None, "a key is not text", key.start_mark)
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key '{key.value}' is repeated", key.start_mark)
                seen.add(key.value)
        super().flatten_mapping(node)


class _Representer(RoundTripRepresenter):
    """Writes null in full, and floats in the form that YAML 1.1 reads as floats."""

    def represent_none(self, data: None) -> ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:null", "null")

    def represent_float(self, data: float) -> ScalarNode:
        text = super().represent_float(data).value
        # 1e-05 has no decimal point, without which YAML 1.1 reads text.
        return self.represent_scalar("tag:yaml.org,2002:float", re.sub(r"^(-?\d+)e", r"\1.0e", text))


_Representer.add_representer(type(None), _Representer.represent_none)
_Representer.add_representer(float, _Representer.represent_float)


def parse_yaml(raw: bytes | str) -> Any:
    """Return the value of a YAML document: dicts, lists, strings, numbers, booleans, dates and None.

    Raises:
        ValueError: the text is not YAML, repeats a key, asks for a Python object, or is nested too deeply; the message
            is one line.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Resolver, yaml.Constructor = _Resolver, _Constructor
    yaml.composer.warn_double_anchors = False
    try:
        return yaml.load(raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except MarkedYAMLError as e:
        line = f" in line {e.problem_mark.line + 1}" if e.problem_mark else ""
        raise ValueError(f"{e.problem}{line}") from e
    except (YAMLError, ValueError, LookupError) as e:
        raise ValueError(" ".join(str(e).split())) from e


def dump_yaml(section: BaseModel) -> str:
    """Return a pydantic model as YAML, one line a value, with the description of each field as a comment above it."""
    yaml = YAML()
    yaml.Resolver, yaml.Representer = _Resolver, _Representer
    yaml.width, yaml.allow_unicode = _WIDTH, False
    out = io.StringIO()
    yaml.dump(_commented(section), out)
    return out.getvalue()


def _commented(section: BaseModel, indent: int = 0) -> CommentedMap:
    found = CommentedMap()
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            value = _commented(value, indent + 2)
        elif isinstance(value, tuple):
            value = CommentedSeq(value)
            value.fa.set_flow_style()
        found[name] = value
        found.yaml_set_comment_before_after_key(name, before=field.description, indent=indent)
    return found
