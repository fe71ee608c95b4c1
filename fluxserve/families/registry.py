"""The families that there are: a line for each. A family is imported when a model of it is first met."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fluxserve.families.base import Family
from fluxserve.job import Job
from fluxserve.media import images
from fluxserve.request import Decode, Tokenize
from fluxserve.spec import ModelSpec

if TYPE_CHECKING:
    from fluxserve.families.base import Architecture, Recipe

NAMES = ("flux", "pixart")


@cache
def named(name: str) -> Family[Any, Any]:
    """Return a family by its name."""
    family: Family[Any, Any] = import_module(f"fluxserve.families.{name}.family").FAMILY
    return family


def of(spec: ModelSpec) -> Family[Any, Any]:
    """Return the family of a model."""
    return named(spec.family)


def recipe(spec: ModelSpec) -> "Recipe[Any]":
    """Return how a model's jobs are drawn."""
    found: Recipe[Any] = import_module(f"fluxserve.families.{spec.family}.recipe").RECIPE
    return found


def architectures(spec: ModelSpec) -> "Mapping[str, Architecture]":
    """Return the modules of a model's components, as torch_eager runs them."""
    found: Mapping[str, Architecture] = import_module(f"fluxserve.families.{spec.family}.reference").architectures(spec)
    return found


def members() -> Iterator[ModelSpec]:
    """Return every published model."""
    return (member for name in NAMES for member in named(name).members)


def by_pipeline(pipeline: str) -> Family[Any, Any] | None:
    """Return the family that one of diffusers' pipelines belongs to."""
    return next((named(name) for name in NAMES if pipeline in named(name).pipelines), None)


def pipelines() -> list[str]:
    """Return the names of all pipelines whose folders can be read."""
    return [pipeline for name in NAMES for pipeline in named(name).pipelines]


def plan(fields: Mapping[str, Any], spec: ModelSpec, tokenize: Tokenize, decode: Decode = images.decode) -> Job:
    """Return the job of a request's fields; see request.common. Raises InvalidRequest."""
    family = of(spec)
    return family.lay_out(family.draft(fields, spec).complete(), spec, tokenize, decode)
