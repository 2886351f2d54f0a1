"""What do the variants of critique and revision do, for the tokens that they sample?

Paper:     Bai et al. 2022, section 3.1 has one of them, 'critique'. The others are ours, or follow
           ideas of others: best-of-n (Nakano et al. 2021), debate (Irving et al. 2018)
Command:   python -m cai_jax.experiment --workdir=runs/lab --experiment=experiments/variants.py
           in the root of the repository, where experiments/tiny_constitution.md is found
Hardware:  two CPU cores; 15 minutes
Arms:      two rounds of each variant, after y_init, which all share. Best-of-n has three
           candidates, rated by the oracle of the embedded world, by its judge, or by likelihood
Expected:  with the oracle as the rater, best-of-n leaves fewer violations than one revision, as in
           the grammar. The embedded model has never read a list of principles, several critiques,
           a choice, a debate or a document: these arms show what it makes of unknown requests,
           and nothing about the variants. Tokens of donors do not count in `tokens_spent`
"""

from cai_jax.experiment import Arm, Experiment, rates_by_arm

ROUNDS = 2
OVERRIDES = {
  'feedback.rounds': ROUNDS,
  'prompts.harmful.limit': 250,  # with each seed
  'prompts.helpful.limit': 8,
  'feedback.topicality': False,
  # Arms whose requests the model has never read collapse. They are shown, not stopped.
  'feedback.max_rate.off_topic_words': 1.0,
  'feedback.max_rate.off_topic': 1.0,
}
# A constitution in prose, in words of the embedded world, and requests that its model has read.
DOCUMENT = {'constitution.path': 'experiments/tiny_constitution.md'}
PROSE = (
  ('critique_request', 'Find any insult, threat, gossip, secret, lie, theft, danger or waste.'),
  (
    'revision_request',
    'Rewrite it with no insult, threat, gossip, secret, lie, theft, danger or waste.',
  ),
)
ORACLE = (('n', 3), ('scorer', 'scorer'), ('scorer_model', 'tiny'))
JUDGE = (('n', 3), ('scorer', 'judge'), ('scorer_model', 'tiny-oracle'))
# The embedded model has never read a question about a critique. Its critiques begin with 'It says'
# or 'I see nothing', so these labels ask it for a second critique under all rules at once.
LABELS = (
  ('decide', 'labels'),
  ('question', 'Find any insult, threat, gossip, secret, lie, theft, danger or waste.'),
  ('finding', 'It'),
  ('no_finding', 'I'),
)
VARIANTS = {
  'critique': ('critique', ()),
  'direct': ('direct', ()),
  'shuffled critiques': ('shuffled', ()),
  'empty critiques': ('empty', ()),
  'if needed by text': ('if_needed', ()),
  'if needed by labels': ('if_needed', LABELS),
  'best of 3 revisions by oracle': ('best_revision', ORACLE),
  'best of 3 revisions by judge': ('best_revision', JUDGE),
  'best of 3 revisions by likelihood': ('best_revision', (('n', 3),)),
  'best of 3 critiques by oracle': ('best_critique', ORACLE),
  'all principles': ('all_principles', ()),
  '3 critiques joined': ('several_critiques', (('n', 3), ('merge', 'join'))),
  '3 critiques merged by the model': ('several_critiques', (('n', 3),)),
  'principle chosen by the model': ('chosen_principle', ()),
  'debate': ('debate', (('statements', 2),)),
}


def get_experiment() -> Experiment:
  """Return the experiment: each variant, scored after its last round."""
  arms = {'initial': Arm(response='initial')}
  for name, (variant, options) in VARIANTS.items():
    overrides = {'feedback.variant': variant, 'feedback.options': options}
    arms[name] = Arm(overrides, f'revision_{ROUNDS}')
  arms['section of a document'] = Arm(DOCUMENT, f'revision_{ROUNDS}')
  prose = {
    'feedback.variant': 'prose',
    'feedback.options': PROSE,
    'feedback.max_rate.critique_copied': 1.0,
  }
  arms['prose'] = Arm(DOCUMENT | prose, f'revision_{ROUNDS}')
  return Experiment(
    arms=arms,
    reference='critique',
    overrides=OVERRIDES,
    spent=True,
    figures=(rates_by_arm('After two rounds', list(arms)[1:]),),
  )
