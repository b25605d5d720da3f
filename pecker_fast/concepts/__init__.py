"""Concepts out of text-to-image pipelines: prompts, their labels, pipeline folders: docs/concepts.md."""

from pecker_fast.concepts import recipe
from pecker_fast.concepts.embedding import embed_prompts
from pecker_fast.concepts.masters import replaced, start_masters
from pecker_fast.concepts.output import extract_delta, write_pipeline
from pecker_fast.concepts.pipeline import PipelineFolder
from pecker_fast.concepts.plan import PromptPlan
from pecker_fast.concepts.request import Erasure

__all__ = [
    "Erasure",
    "PipelineFolder",
    "PromptPlan",
    "embed_prompts",
    "extract_delta",
    "recipe",
    "replaced",
    "start_masters",
    "write_pipeline",
]
