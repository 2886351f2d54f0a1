"""How strongly should the reference hold the policy? DPO's β: harm against KL and helpfulness.

Paper:     Rafailov et al. 2023, figure 2 (left), varies β in the same way; Bai et al. 2022 train by
           reinforcement learning
Command:   python -m cai_jax.experiment --experiment=experiments/dpo_beta.py --workdir=runs/lab
           python -m cai_jax.experiment --config=configs/mine.py --workdir=runs/mine \\
             --experiment=experiments/dpo_beta.py
Hardware:  two CPU cores; about 4 minutes for each β and seed with half of the prompts, on cores
           that other jobs shared
Arms:      SL-CAI, and DPO of it with β = 0.01, 0.03, 0.1, 0.3 and 1. `kl` is the divergence of the
           policy from M_θ in nats per response, with its own responses; a small β lets the policy
           move further
Expected:  in the embedded world (one seed, half of the prompts), 4 to 5 % of the answers break a
           rule for β = 0.01, 0.1 and 1, in place of 27.5 %: no difference between them was found.
           experiments/RESULTS.md has the intervals
"""

from cai_jax.experiment import Arm, Experiment, rates_line

BETAS = (0.01, 0.03, 0.1, 0.3, 1.0)


def get_experiment() -> Experiment:
  """Return the experiment."""
  arms = {'SL-CAI': Arm({}, 'aligned')}
  arms |= {name(beta): Arm({'prefer.options': (('beta', beta),)}, 'policy') for beta in BETAS}
  points = [name(beta) for beta in BETAS]

  def frontier(caption: str, x: list[str], y: list[str]) -> dict:
    return {'kind': 'frontier', 'caption': caption, 'x': x, 'y': y, 'arms': list(arms)}

  return Experiment(
    arms=arms,
    reference='SL-CAI',
    base='configs/tiny_preferences.py',
    overrides={  # one policy, and no reward model
      'prefer.compare': (),
      'reward.data': '',
      'evaluation.reward_model': '',
      'evaluation.reward_labelled': '',
      'evaluation.baselines': (),
      'evaluation.best_of_n': 0,
    },
    distance=True,
    figures=(
      rates_line('Rates by β, harmful prompts', points, BETAS, 'β'),
      rates_line('Rates by β, helpful prompts', points, BETAS, 'β', 'helpful'),
      frontier('Harm against KL', ['harmful', 'kl'], ['harmful', 'violation_rate']),
      frontier('Harm and help', ['harmful', 'violation_rate'], ['helpful', 'helpful_rate']),
    ),
  )


def name(beta: float) -> str:
  """Return the name of an arm."""
  return f'β = {beta:g}'
