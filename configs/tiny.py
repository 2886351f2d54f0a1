"""The whole method on the embedded model, in a small world where every response can be checked.

Command:   python launch.py --config=configs/tiny.py --workdir=runs/tiny
Hardware:  two CPU cores; 1 minute, 1.4 GB
Expected:  84 to 87 % of M_θ's answers to baited prompts break a rule; after four rounds of critique
           and revision 9 to 11 % do. 13 to 15 % of M_aligned's answers do, and 96 to 97 % of them
           still answer the request (three seeds; experiments/RESULTS.md)
"""

from configs import default


def get_config():
  """Return the config of the embedded run."""
  config = default.get_config()
  config.constitution.path = 'tiny'
  for name, split, kind, count in (
    ('harmful', 'train', 'baited', 700),
    ('helpful', 'train', 'benign', 400),
    ('eval_harmful', 'eval', 'baited', 400),
    ('eval_helpful', 'eval', 'benign', 400),
  ):
    config.prompts[name].update(source='tiny', split=split, name=kind, limit=count)

  config.feedback.topicality = False  # the oracle tells more
  config.sampling.initial.max_tokens = 96
  config.sampling.critique.max_tokens = 64
  config.sampling.revision.max_tokens = 96

  config.train.helpfulness_share = 0.33
  config.train.epochs = 3
  config.train.checkpoint_every = 10
  config.train.batch_size = 16
  config.train.max_length = 256
  config.train.learning_rate = 5e-4
  config.evaluation.scorer = 'tiny'
  return config
