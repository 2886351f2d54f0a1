"""The judge that an evaluation asks for."""

from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.scoring.judge import JUDGES, Judge
from cai_jax.scoring.judge_local import Reasoning, judge_dialogue, local_judge
from cai_jax.scoring.judge_remote import remote_judge
from cai_jax.scoring.loader import ModelLoader


def load_judge(config: EvaluationConfig, loader: ModelLoader, seed: int = 0) -> Judge:
  """Return the judge of an evaluation: one of `JUDGES`, a language model, or a served one.

  Args:
    config: the settings of the evaluation.
    loader: loads the model, or gives the client that asks a served judge.
    seed: seed of what the judge writes before its verdicts.

  Raises:
    UserError: if the model cannot be loaded, or its chat template cannot be used.
  """
  if config.judge_remote:
    client = loader.client(config.judge_remote, 'judge')
    return remote_judge(client, reasoning_tokens=config.judge_reasoning, seed=seed)
  if config.judge in JUDGES:
    return JUDGES[config.judge](loader)
  lm = loader.language_model(config.judge)
  dialogue = judge_dialogue(lm.tokenizer, lm.eos_token_ids, loader.template_options, config.style)
  return local_judge(lm, dialogue, reasoning=Reasoning(config.judge_reasoning, seed=seed))
