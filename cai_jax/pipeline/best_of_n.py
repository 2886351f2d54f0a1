"""Rejection sampling: the best of several answers of M_θ to each training prompt, as data."""

from typing import Any

import numpy as np

from cai_jax.data import d_cai
from cai_jax.evaluation.baselines.best_of_reward import choose_highest
from cai_jax.evaluation.config import TRAINED
from cai_jax.feedback.job import repeat_prompts
from cai_jax.pipeline.baselines import copy_ids, write_answers
from cai_jax.pipeline.chains import prepare_job, sample_dataset
from cai_jax.pipeline.models import model_loader, open_models
from cai_jax.pipeline.policies import BEST_OF_N
from cai_jax.pipeline.run import Run
from cai_jax.runtime import processes

CANDIDATES = f'prefer/{BEST_OF_N}'  # folder of all answers


def write_best_answers(run: Run) -> dict[str, Any]:
  """Write the answers that the run's reward model likes best to `best_of_n/`, as a D_CAI.

  Fine-tune on them with `data.d_cai` and `train.target='initial'` in another run. Answers to
  harmful prompts and to helpful ones keep their kind.

  Args:
    run: the run, whose reward model is trained.

  Returns:
    Counts and speeds for the manifest.

  Raises:
    UserError: if M_θ cannot be sampled from.
  """
  folder, count = run.workdir / BEST_OF_N, run.config.reward.best_of_n
  kinds = {prompt.id: kind for kind in ('harmful', 'helpful') for prompt in run.prompts[kind]}
  prompts = repeat_prompts([*run.prompts['harmful'], *run.prompts['helpful']], count)
  with open_models(run) as sampled:
    job = prepare_job(run, {'base': sampled['base']}, [], prompts)
    counts = sample_dataset(run, job, run.workdir / CANDIDATES, BEST_OF_N)
  del sampled, job

  def choose() -> dict[str, Any]:
    rows = {row['id']: row for row in d_cai.read_rows(run.workdir / CANDIDATES)}
    candidates = [
      [
        rows[name] | {'id': prompt, 'kind': kind}
        for name in copy_ids(prompt, count)
        if name in rows
      ]
      for prompt, kind in kinds.items()
    ]
    candidates = [group for group in candidates if group]  # the chains of the others ended early
    model = model_loader(run).reward_model(TRAINED, run.config.feedback.style)
    best, _ = choose_highest(model.scores, candidates, {}, np.random.default_rng(0))
    write_answers(folder, [group[i] for group, i in zip(candidates, best, strict=True)])
    return {'rows': len(candidates), 'answers': count, 'first_kept': best.count(0)}

  chosen = processes.run_on_process_0('choose the best answers', choose) or {}
  return {**counts, **chosen}
