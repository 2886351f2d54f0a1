"""What happens if M_aligned becomes M_θ, again and again? Rates and diversity by generation.

Paper:     Bai et al. 2022 fine-tune once, from a pre-trained model
Command:   python -m cai_jax.experiment --experiment=experiments/self_training.py --workdir=runs/lab
           python -m cai_jax.experiment --config=configs/mine.py --workdir=runs/mine \\
             --experiment=experiments/self_training.py:5
Hardware:  two CPU cores; 35 seconds of CPU time for each generation of 300 prompts, 1.6 GB
Arms:      M_θ; and generations 1 to 3 (or the number after the colon). The M_aligned of a
           generation is the M_θ of the next: it answers the same training prompts, revises its
           answers and is fine-tuned on them. A control learns its own first answers instead of
           revisions, as often. All answer the same held-out prompts. Diversity is that of all
           answers together: distinct words and word pairs, self-BLEU (lower is more diverse), and
           the spread of the embeddings of generation 0
Expected:  in the embedded world, 89 % of M_θ's answers break a rule, and in three generations 24,
           6 and 4 % do, as if rounds of revision added up. Answers become shorter, and the share of
           different word pairs falls from 0.32 to 0.29; that of the control falls to 0.31
           (RESULTS.md)
"""

from cai_jax.experiment import Arm, Experiment, rates_line
from cai_jax.runtime.errors import UserError

MEASURES = {
  'distinct_1': 'different words / words',
  'distinct_2': 'different word pairs / word pairs',
  'self_bleu': 'self-BLEU (lower: more diverse)',
  'embedding_spread': 'mean cosine distance',
}
LEARNT = {  # what each line of models learns
  'generation': {'train.target': 'last'},
  'control': {'train.target': 'initial', 'feedback.rounds': 1},  # no revision is learnt
}


def get_experiment(generations: str = '3') -> Experiment:
  """Return the experiment.

  Args:
    generations: how often M_aligned becomes M_θ, at least '1'.

  Raises:
    UserError: if that is no such number.
  """
  if not generations.isdecimal() or not int(generations):
    raise UserError(
      f'The text after the colon is {generations!r}. It must be a number of generations, such as 3.'
    )
  numbers = range(1, int(generations) + 1)
  arms = {'M_θ': Arm(LEARNT['generation'], 'base')}
  for name, overrides in LEARNT.items():
    for number in numbers:
      start = f'{name} {number - 1}' if number > 1 else ''
      arms[f'{name} {number}'] = Arm(overrides, 'aligned', start=start)
  lines = {name: ['M_θ', *(f'{name} {number}' for number in numbers)] for name in LEARNT}
  x = [0, *numbers]
  return Experiment(
    arms=arms,
    reference='M_θ',
    diversity=tuple(MEASURES),
    figures=(
      *(
        rates_line(
          f'Answers to held-out {label} prompts by generation',
          lines['generation'],
          x,
          'generation',
          group,
          'share of answers (%)',
        )
        for group, label in (('harmful', 'harmful'), ('helpful', 'benign'))
      ),
      *(
        {
          'kind': 'line',
          'caption': f'Diversity of answers to harmful prompts: {measure.replace("_", " ")}',
          'group': 'harmful',
          'x_label': 'generation',
          'y_label': label,
          'series': [
            {'name': name, 'metric': measure, 'arms': line, 'x': x} for name, line in lines.items()
          ],
        }
        for measure, label in MEASURES.items()
      ),
    ),
  )
