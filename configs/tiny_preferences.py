"""From preferences to policies in the embedded world: fine-tuning, a reward model, DPO, best-of-8.

Command:   python launch.py --config=configs/tiny_preferences.py --workdir=runs/tiny_preferences
Hardware:  two CPU cores; 7 minutes on cores that other jobs shared, 1.5 GB
Expected:  12.5 % of SL-CAI's answers to baited prompts break a rule, and 0.8 % after DPO; 11.0 %
           after DPO without SL-CAI; and 39.0 % of the best of 8 by the reward model, which is
           right on 100 % of 400 labelled pairs (seed 0; experiments/RESULTS.md). DPO shortens
           answers by a third, and 94.8 % in place of 97.2 % still answer benign requests
"""

from configs import tiny


def get_config():
  """Return the config of the embedded run with preferences."""
  config = tiny.get_config()
  # Pairs of the last revision and the initial response, as D_CAI implies them.
  config.reward.data = config.prefer.data = 'implied'
  for section in (config.reward, config.prefer):
    section.max_length = 256
    section.batch_size = 4  # about 12 comparisons
    section.epochs = 2
    section.checkpoint_every = 20
    section.drop_truncated = False

  config.reward.init = 'base'
  config.reward.learning_rate = 3e-4

  config.prefer.objective = 'dpo'
  config.prefer.options = (('beta', 0.1),)
  config.prefer.init = 'aligned'
  config.prefer.compare = ('base',)  # DPO without fine-tuning
  config.prefer.learning_rate = 1e-4

  config.evaluation.scores = ('kl',)
  config.evaluation.reward_model = 'trained'
  config.evaluation.reward_labelled = 'tiny'
  config.evaluation.baselines = ('best_of_reward',)
  config.evaluation.best_of_n = 8
  config.evaluation.judge = 'tiny-oracle'
  config.evaluation.judge_labelled = 'tiny'
  return config
