"""Reads the options of TRL's, PEFT's and bitsandbytes' config classes out of their source, without importing them.

Importing TRL's trainers takes seconds and pulls in torch; a typo, `--help` or a printed config should not. So names,
types, defaults, help texts and allowed values come from the syntax tree of the *installed* source. There is no second
list to keep in step, and `tests/test_schema.py` holds what is read here against the real classes.
"""

import ast
import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from dataclasses import field as dataclass_field
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Optional, Union, get_args, get_origin

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# "Possible values are: `'sigmoid'`, `'hinge'` (SVM) and ...": how help texts name the allowed values.
_VALUES_IN_HELP = re.compile(
    r"(?:(?:Possible|Supported) values are|Must be one of|specified by):?\s+"
    r"((?:[`'\"]+[\w.-]+[`'\"]+(?:\s+\([^)]*\))?(?:,\s+and\s+|,\s+or\s+|,\s+|\s+and\s+|\s+or\s+)?)+)(?=\.|$)"
)


@dataclass(frozen=True)
class Option:
    """One option of a config class, as the source states it."""

    name: str
    owner: str  # the class that declares it
    kind: Any  # its type; a class that is written as a mapping in YAML is dict, an enum is str
    default: str  # as written, "" if there is none
    value: Any  # the default where it is a literal, else MISSING
    help: str
    choices: tuple[str, ...]  # the allowed values, () where the source names none

    @property
    def annotation(self) -> str:
        """The type in words."""
        return _spelled(self.kind)

    def accept(self, value: Any) -> Any:
        """The value as this option takes it: one string may stand for a list of one.

        Raises:
            ValueError: if the type or the value is not allowed, with what is.
        """
        if isinstance(value, str) and not _accepts(self.kind, value) and _accepts(self.kind, [value]):
            value = [value]
        items = value if isinstance(value, list) else [value]
        if self.choices and not all(_among(item, self.choices) for item in items if isinstance(item, str)):
            raise ValueError(f"expected one of {', '.join(self.choices)}")
        if not _accepts(self.kind, value):
            raise ValueError(f"expected {self.annotation}")
        return value


@functools.cache
def options(path: str) -> Mapping[str, Option]:
    """The options of the class at `path` (such as `trl.SFTConfig`), inherited ones first.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        LookupError: if the package has no such class.
    """
    module, _, name = path.rpartition(".")
    found = _definition(module, name)
    if found is None:
        raise LookupError(f"no class {name} in the source of {module}: `make setup` installs the tested versions")
    return dict(_fields(*found))


@functools.cache
def keys(module: str, name: str) -> tuple[str, ...]:
    """The keys of the mapping that a module assigns to a name.

    Raises:
        LookupError: the module has no such mapping.
    """
    for statement in _statements(_parse(module)[0].body):
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
            assert isinstance(statement.value, ast.Dict), ast.unparse(statement)
            return tuple(_literal(key) for key in statement.value.keys)
    raise LookupError(f"no {name} in the source of {module}: `make setup` installs the tested versions")


def node(fields: Mapping[str, Option], values: Mapping[str, Any], *, defaults: bool) -> DictConfig:
    """A Hydra node that holds these values under their options' types, `Any` where OmegaConf cannot hold the type.

    With `defaults`, the other options are there too, with their defaults. Without, the node has no other key: defaults
    stay the library's business, and what somebody set can be told from what nobody touched.
    """
    kept = [fields[name] for name in fields if defaults or name in values]
    typed = [(option.name, option.kind if _holder(option.kind) else Any, _default(option.value)) for option in kept]
    config: DictConfig = OmegaConf.structured(make_dataclass("Node", typed))
    for name, value in values.items():
        config[name] = value
    return config


def _fields(module: str, definition: ast.ClassDef) -> Iterator[tuple[str, Option]]:
    """The fields of a dataclass, those of its bases first; of another class, the arguments of its `__init__`."""
    documented = _documented(definition)
    constructor = next((i for i in definition.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"), None)
    declared: list[tuple[str, ast.expr | None, ast.expr | None, dict[str, Any]]] = []
    if constructor is not None:
        arguments = constructor.args.args[1:]
        defaults = [*[None] * (len(arguments) - len(constructor.args.defaults)), *constructor.args.defaults]
        declared = [(a.arg, a.annotation, default, {}) for a, default in zip(arguments, defaults, strict=True)]
    elif any("dataclass" in ast.unparse(decorator) for decorator in definition.decorator_list):
        for base in reversed(definition.bases):
            found = _definition(module, base.id) if isinstance(base, ast.Name) else None
            if found is not None:
                yield from _fields(*found)
        declared = [
            (item.target.id, item.annotation, *_field(item.value))
            for item in definition.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        ]
    for name, written, default, metadata in declared:
        value = _literal(default)
        annotation = written or ast.Name("Any" if value in (None, MISSING) else type(value).__name__)
        help_text = " ".join(str(metadata.get("help") or documented.get(name, "")).replace("%%", "%").split())
        kind, enumerated = _kind(module, annotation)
        option = Option(
            name=name,
            owner=definition.name,
            kind=kind,
            default="" if default is None else ast.unparse(default),
            value=value,
            help=help_text,
            choices=tuple(metadata.get("choices") or enumerated or _choices(kind) or _values_in(help_text, kind)),
        )
        yield name, option


# ------------------------------------------------------------------------------------------------ finding the source


@functools.cache
def _parse(module: str) -> tuple[ast.Module, bool]:
    """A module's syntax tree, and whether it is a package. `find_spec` on a submodule would import its package."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{top} is not installed: `make setup` installs the tested versions", name=top)
    path = Path(spec.submodule_search_locations[0], *rest)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")), path.is_dir()


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, with those under `if TYPE_CHECKING:`, where lazy packages import."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements([*statement.body, *statement.orelse])


@functools.cache
def _definition(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The class that a module calls `name` and the module that defines it, followed through `from ... import`."""
    tree, is_package = _parse(module)
    for statement in _statements(tree.body):
        if isinstance(statement, ast.ClassDef) and statement.name == name:
            return module, statement
        if isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    parts = module.split(".")
                    base = parts[: len(parts) + is_package - statement.level] if statement.level else []
                    return _definition(".".join([*base, *([statement.module] if statement.module else [])]), alias.name)
    return None


# ------------------------------------------------------------------------------------------------- reading one field


def _literal(default: ast.expr | None) -> Any:
    try:
        return MISSING if default is None else ast.literal_eval(default)
    except ValueError:
        return MISSING


def _field(value: ast.expr | None) -> tuple[ast.expr | None, dict[str, Any]]:
    """Default and literal metadata of `name: type = value`, where value may be `field(default=..., metadata=...)`."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field")):
        return value, {}
    arguments = {keyword.arg: keyword.value for keyword in value.keywords}
    metadata = arguments.get("metadata")
    pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
    literal = {_literal(key): _literal(item) for key, item in pairs}
    default = arguments.get("default", arguments.get("default_factory"))
    return default, {key: item for key, item in literal.items() if item != MISSING}


def _documented(definition: ast.ClassDef) -> dict[str, str]:
    """Arguments described in a class docstring of the form `name (type): text`, with deeper indented lines of text."""
    docstring = ast.get_docstring(definition) or ""
    return dict(re.findall(r"^    (\w+)\s?\(.*\):?\n((?: {8}.*\n?)+)", docstring, flags=re.MULTILINE))


class _Names(dict[str, Any]):
    """Names in annotations. A class that is not known here is written as a mapping in YAML, an enum as a string."""

    def __init__(self, module: str) -> None:
        super().__init__({kind.__name__: kind for kind in (int, float, bool, str, list, dict, tuple, set)})
        self.update({"Any": Any, "Optional": Optional, "Union": Union, "Literal": Literal})
        self.module = module
        self.enumerated: tuple[str, ...] = ()

    def __missing__(self, name: str) -> type:
        found = _definition(self.module, name)
        values = [_literal(item.value) for item in found[1].body if isinstance(item, ast.Assign)] if found else []
        if not values or not all(isinstance(value, str) for value in values):
            return dict
        self.enumerated = tuple(values)
        return str


def _kind(module: str, annotation: ast.expr) -> tuple[Any, tuple[str, ...]]:
    """The annotation as a type, and the values of the enum it names, if it names one and no list of it."""
    names = _Names(module)
    text = ast.unparse(annotation)
    kind = eval(text, {"__builtins__": {}}, names)  # an annotation of an installed library, over the names above
    return kind, () if "list" in text else names.enumerated


def _choices(kind: Any) -> list[str]:
    """The strings of a Literal, alone or in a union."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    literal = [value for part in parts if get_origin(part) is Literal for value in get_args(part)]
    return [value for value in literal if isinstance(value, str)]


def _spelled(kind: Any) -> str:
    """`Optional[Union[list[str], str]]` as `list[str] | str | null`: null is YAML's None."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(map(_spelled, parts))
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(_spelled, parts))}]"
    return "null" if kind is NoneType else "anything" if kind is Any else str(kind.__name__)


def _values_in(help_text: str, kind: Any) -> list[str]:
    """The allowed values of a text option, where its help lists two or more."""
    found = _VALUES_IN_HELP.search(help_text) if kind in (str, str | None, list[str], Any) else None
    values = re.findall(r"[`'\"]+([\w.-]+)[`'\"]+", re.sub(r"\([^)]*\)", "", found[1])) if found else []
    return values if len(values) > 1 else []


# ------------------------------------------------------------------------------------------------ checking one value


def _default(value: Any) -> Any:
    return dataclass_field(default_factory=lambda: value) if isinstance(value, list | dict) else value


@functools.cache
def _holder(kind: Any) -> type | None:
    """A structured config with one key `value` of this type, None where OmegaConf cannot hold it (unions of lists)."""
    holder = make_dataclass("Holder", [("value", kind, dataclass_field(default=MISSING))])
    try:
        OmegaConf.structured(holder)
    except OmegaConfBaseException:
        return None
    return holder


def _accepts(kind: Any, value: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin is tuple:
        return isinstance(value, list) and len(value) == len(parts) and all(map(_accepts, parts, value))
    holder = _holder(kind)
    if holder is not None:
        try:
            OmegaConf.structured(holder).value = value
        except OmegaConfBaseException:
            return False
        return True
    if origin in (Union, UnionType):
        return any(isinstance(value, part) if part in (str, NoneType) else _accepts(part, value) for part in parts)
    if origin is Literal:
        return value in parts or (isinstance(value, str) and _among(value, [str(part) for part in parts]))
    if origin in (list, set):
        return isinstance(value, list) and all(_accepts(parts[0], item) for item in value)
    return isinstance(value, origin or kind)


def _among(value: str, choices: Sequence[str]) -> bool:
    """Whether a value is one of the choices, where `pissa_niter_[number of iters]` stands for any number."""
    return any(fnmatch.fnmatchcase(value, re.sub(r"\[.*\]", "*", choice)) for choice in choices)
