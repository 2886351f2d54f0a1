"""What do the variants of critique and revision make of a real, very small model?

Paper:     see experiments/variants.py
Command:   python -m cai_jax.experiment --workdir=runs/real --seeds=0 \\
             --experiment=experiments/variants_real.py --config=my_smollm2.py
Config:    my_smollm2.py sets the model's folder and 48 prompts on top of configs/smollm2_135m.py
Hardware:  two CPU cores; see RESULTS.md
Arms:      one round of each variant, after y_init, which all share; likelihood rates candidates.
           Contexts with all 20 principles are long, so an arm has the 4 general ones
Expected:  revisions that are worthless, as in configs/smollm2_135m.py. The experiment shows that
           the variants run on a real model, what they cost, and how they fail
"""

from cai_jax.experiment import Arm, Experiment

PROSE = {'constitution.path': 'experiments/constitution.md'}
VARIANTS = {
  'critique': ('critique', ()),
  'direct': ('direct', ()),
  'if needed by text': ('if_needed', ()),
  'if needed by labels': ('if_needed', (('decide', 'labels'),)),
  'best of 3 revisions': ('best_revision', (('n', 3),)),
  'best of 3 critiques': ('best_critique', (('n', 3),)),
  'all principles': ('all_principles', ()),
  '2 critiques merged': ('several_critiques', (('n', 2),)),
  'principle chosen by the model': ('chosen_principle', ()),
  'debate': ('debate', (('statements', 2),)),
}


def get_experiment() -> Experiment:
  """Return the experiment: one round of each variant."""
  arms = {'initial': Arm(response='initial')}
  for name, (variant, options) in VARIANTS.items():
    overrides = {'feedback.variant': variant, 'feedback.options': options}
    arms[name] = Arm(overrides, 'revision_1')
  general = arms['all principles'].overrides | {'constitution.tags': ('general',)}
  arms['general principles'] = Arm(general, 'revision_1')
  arms['section of a document'] = Arm(PROSE, 'revision_1')
  arms['prose'] = Arm(PROSE | {'feedback.variant': 'prose'}, 'revision_1')
  return Experiment(
    arms=arms,
    reference='critique',
    overrides={'feedback.rounds': 1},
    spent=True,
    base='configs/smollm2_135m.py',
    seeds=(0,),
  )
