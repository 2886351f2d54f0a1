"""Run the measures that the config of an evaluation asks for."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cai_jax.dialogue import Dialogue
from cai_jax.evaluation import measures as measures  # importing it registers the built-in measures
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.registries import (
  COMPARISONS,
  MODEL_MEASURES,
  RESPONSE_MEASURES,
  ModelComparison,
  ModelMeasure,
  Policy,
  ResponseMeasure,
  Row,
)
from cai_jax.model.lm import LM
from cai_jax.scoring.loader import ModelLoader


def load_response_measures(config: EvaluationConfig, loader: ModelLoader) -> list[ResponseMeasure]:
  """Return the measures of responses that the config asks for, with their models loaded.

  Args:
    config: the settings of the evaluation.
    loader: loads the models of measures.

  Raises:
    UserError: if a model cannot be loaded.
  """
  loaded = (load(config, loader) for load in RESPONSE_MEASURES.values())
  return [measure for measure in loaded if measure is not None]


def evaluate_model(
  config: EvaluationConfig, lm: LM, rows: Sequence[Row], dialogue: Dialogue
) -> dict[str, Any]:
  """Return the results of the measures of a model that the config asks for, by name.

  Args:
    config: the settings of the evaluation.
    lm: the model.
    rows: rows of M_θ on held-out prompts.
    dialogue: renders messages for the model.
  """
  results = {
    name: measure.measure(lm, rows, dialogue) for name, measure in _model_measures(config).items()
  }
  return {name: result for name, result in results.items() if result is not None}


def compare_models(
  config: EvaluationConfig,
  loader: ModelLoader,
  base: Sequence[Row],
  aligned: Sequence[Row],
  seed: int,
  policies: Mapping[str, Policy] = MappingProxyType({}),
) -> dict[str, Any]:
  """Return the results of the comparisons of models that the config asks for, by name.

  Args:
    config: the settings of the evaluation.
    loader: loads the models that compare.
    base: rows of M_θ.
    aligned: rows of M_aligned on the same prompts.
    seed: seed of the run.
    policies: the policies that learnt from preferences, by name.
  """
  results = {}
  for name, comparison in _comparisons(config).items():
    if policies and comparison.compare_policies:
      results[name] = comparison.compare_policies(loader, base, aligned, seed, policies)
    else:
      results[name] = comparison.compare(loader, base, aligned, seed)
  return {name: result for name, result in results.items() if result is not None}


def describe(config: EvaluationConfig, results: Mapping[str, Any]) -> str:
  """Return the results of a run's models as lines of text.

  Args:
    config: the settings of the evaluation.
    results: results of `evaluate_model` by name of the model, and those of `compare_models`.
  """
  model_measures, comparisons = _model_measures(config), _comparisons(config)
  lines = []
  for model in (name for name in results if name not in comparisons):
    for name, measure in model_measures.items():
      if name in results[model]:
        lines += measure.describe(model, results[model][name])
  for name, comparison in comparisons.items():
    if name in results:
      lines += comparison.describe(results[name])
  return '\n'.join(lines)


def _model_measures(config: EvaluationConfig) -> dict[str, ModelMeasure]:
  created = {name: create(config) for name, create in MODEL_MEASURES.items()}
  return {name: measure for name, measure in created.items() if measure is not None}


def _comparisons(config: EvaluationConfig) -> dict[str, ModelComparison]:
  created = {name: create(config) for name, create in COMPARISONS.items()}
  return {name: comparison for name, comparison in created.items() if comparison is not None}
