"""From recipes and command line to a Job, remembering where every value came from.

Recipes are YAML; several merge in order, the command line comes last. A name like ``gpt/tiny`` is looked up
among the recipes that Headway ships, anything else is a path.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from headway.pretrain.config import Job
from headway.pretrain.errors import HeadwayError, JobError

COMMAND_LINE = "command line"
DEFAULT = "default"


class InvalidJob(HeadwayError):
    """Several settings of a job are wrong at once; one line for each."""

    exit_code = 2


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers and booleans of YAML 1.2 that refuses a key given twice.

    `3e-4` is a number, `off`, `no` and their kin are words, and so are `24:00:00` and `010`.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 - as the base class has it
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?((\d[\d_]*\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|nan))$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*|0x[\da-fA-F]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))


@dataclass(frozen=True)
class Resolved:
    """A job and, for every dotted setting, where its value came from."""

    job: Job
    origins: dict[str, str]

    def settle(self, field: str, value: Any, origin: str) -> Resolved:
        """The same job with one value replaced by what was chosen for it."""
        return self.settle_all({field: value}, origin)

    def settle_all(self, values: Mapping[str, Any], origin: str) -> Resolved:
        """The same job with some values replaced at once."""
        tree = self.job.model_dump()
        for field, value in values.items():
            *sections, key = field.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
            place[key] = value
        return Resolved(validate(tree), {**self.origins, **dict.fromkeys(values, origin)})

    def set_by_hand(self, field: str) -> bool:
        return self.origins.get(field, DEFAULT) == COMMAND_LINE


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML safely; raises JobError with the file and line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{where}:{mark.line + 1}" if mark else where
        raise JobError("recipe", place, f"is not valid YAML: {getattr(error, 'problem', error)}") from None


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that Headway ships."""
    root = Path(str(files("headway.configs")))
    found = {str(p.relative_to(root).with_suffix("")): p for p in sorted(root.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not name.startswith("cluster/")}


def find_recipe(name: str) -> Path:
    """The file of a recipe given by shipped name or path; raises JobError with the nearest known name."""
    known = shipped_recipes()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_file():
        return path
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
    rule = f"is neither a file nor a recipe that Headway ships ({', '.join(known)})"
    raise JobError("recipe", name, rule, near[0] if near else None)


def resolve(recipes: Sequence[str], sets: Sequence[str] = ()) -> Resolved:
    """Merge recipes in order, then `a.b=c` overrides; validate.

    Raises:
        JobError, InvalidJob: naming field, value, rule and the nearest legal choice.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name in recipes:
        path = find_recipe(name)
        layer = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        if not isinstance(layer, dict):
            raise JobError("recipe", str(path), "must be a mapping of sections")
        _merge(tree, layer, origins, path.name if path.name == "job.yaml" else name)
    for item in sets:
        key, sign, value = item.partition("=")
        if not sign or not key:
            raise JobError("--set", item, "must have the form a.b=c", "--set train.steps=100")
        layer = parse_yaml(value, f"--set {key}")
        for part in reversed(key.strip().split(".")):
            layer = {part: layer}
        _merge(tree, layer, origins, COMMAND_LINE)
    if "run" not in tree or "name" not in (tree["run"] or {}):
        _merge(tree, {"run": {"name": default_name(recipes)}}, origins, "name of the recipe")
    return Resolved(validate(tree), origins)


def default_name(recipes: Sequence[str]) -> str:
    """Run name from the last recipe: ``gpt/tiny`` -> ``gpt-tiny``."""
    last = recipes[-1] if recipes else "run"
    stem = last if last in shipped_recipes() else Path(last).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "run"


def validate(tree: dict[str, Any]) -> Job:
    """A Job from a plain tree; raises JobError or InvalidJob."""
    return validate_as(Job, tree)


Kind = TypeVar("Kind", bound=BaseModel)


def validate_as(kind: type[Kind], tree: dict[str, Any]) -> Kind:
    """A section from a plain tree; raises JobError or InvalidJob."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        found = [_explain(e, kind) for e in error.errors()]
        if len(found) == 1:
            raise found[0] from None
        raise InvalidJob("\n".join(str(e) for e in found)) from None


def _explain(error: Any, kind: type[BaseModel]) -> JobError:
    field = ".".join(str(part) for part in error["loc"])
    value = error["input"]
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, list(fields(kind)), n=1, cutoff=0.4)
        return JobError(field, value, "is not a setting that Headway knows", near[0] if near else None)
    rule = error["msg"][0].lower() + error["msg"][1:]
    nearest = None
    context = error.get("ctx", {})
    if error["type"] == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0)
        nearest = near[0] if near else None
    else:
        nearest = next((context[k] for k in ("ge", "le") if k in context), None)
    return JobError(field, value, rule, nearest)


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings below a section."""
    for name, info in section.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, f"{prefix}{name}.")


def leaves(job: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting of a job, in order."""
    for name in type(job).model_fields:
        value = getattr(job, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def as_plain(item: Any) -> Any:
    """An item of a list of settings as people read it: a source by its path, others by what was set."""
    if not isinstance(item, BaseModel):
        return item
    return getattr(item, "path", None) or item.model_dump(exclude_defaults=True)


def _merge(tree: dict, layer: dict, origins: dict[str, str], origin: str, prefix: str = "") -> None:
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            if not isinstance(tree.get(key), dict):
                tree[key] = {}
            _merge(tree[key], value, origins, origin, f"{name}.")
        else:
            tree[key] = value
            origins[name] = origin


_ORIGIN = "  # from: "


def dump(resolved: Resolved) -> str:
    """The resolved job as YAML, every value with its origin in a comment; loads again as a recipe."""
    lines: list[str] = []
    open_sections: list[str] = []
    for name, value in leaves(resolved.job):
        *sections, key = name.split(".")
        shared = next(
            (i for i, (a, b) in enumerate(zip(sections, open_sections, strict=False)) if a != b), None
        )
        start = min(len(sections), len(open_sections)) if shared is None else shared
        lines += [f"{'  ' * i}{sections[i]}:" for i in range(start, len(sections))]
        open_sections = sections
        plain = (
            [v.model_dump() if isinstance(v, BaseModel) else v for v in value]
            if isinstance(value, list)
            else value
        )
        origin = resolved.origins.get(name, DEFAULT)
        lines.append(f"{'  ' * len(sections)}{key}: {one_line(plain)}{_ORIGIN}{origin}")
    return "\n".join(lines) + "\n"


def one_line(value: Any) -> str:
    """A plain value as YAML on one line."""
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value, ensure_ascii=False)  # JSON strings are YAML strings, and stay on one line
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def load_job(path: Path) -> Resolved:
    """Read a `job.yaml` that `dump` wrote, origins included; raises JobError."""
    text = path.read_text(encoding="utf-8")
    job = validate(parse_yaml(text, str(path)))
    comments = [line.rpartition(_ORIGIN)[2] for line in text.splitlines() if _ORIGIN in line]
    names = [name for name, _ in leaves(job)]
    return Resolved(job, dict(zip(names, comments, strict=False)))
