"""The constitution: principles, few-shot demonstrations, and the draw of principles for a prompt.

A constitution is a YAML or JSON file of this form (see cai_jax/constitution.yaml):

  principles:
    - id: no_insults                 # unique; stored in every record
      critique_request: ...          # asks the model to critique its response
      revision_request: ...          # asks the model to revise its response
      weight: 1.0                    # optional: relative probability of being drawn, above 0
      tags: [respect, general]       # optional: names that `ConstitutionConfig.tags` can select
      comparison_request: ...        # optional: asks which of two responses is better
  demonstrations:                    # optional: few-shot dialogues, put before every prompt
    - - {role: user, content: ...}
      - {role: assistant, content: ...}
      - {role: critique_request, content: ...}
      - {role: critique, content: ...}
      - {role: revision_request, content: ...}
      - {role: revision, content: ...}

`load_constitution` also reads the JSON files published with Bai et al. 2022, "Constitutional AI:
Harmlessness from AI Feedback" (repository anthropics/ConstitutionalHarmlessnessPaper): either
CritiqueRevisionInstructions.json alone, or a folder that contains it and, optionally,
CritiqueRevisionFewShotPrompts.json. The third form is that of Hugging Face's recipe:
{"constitutions": [{"critic": ..., "revision": ...}], "system_chat": [[messages], ...]}.

AI feedback asks the comparison requests. A JSON list of texts, such as the paper's
RLMadisonInstructions.json, is a constitution of such requests; `convert` makes the others of each.
"""

from cai_jax.constitution.loading import CONSTITUTIONS, ConstitutionConfig, load_constitution
from cai_jax.constitution.principles import Constitution, Principle, draw_principles

__all__ = [
  'CONSTITUTIONS',
  'Constitution',
  'ConstitutionConfig',
  'Principle',
  'draw_principles',
  'load_constitution',
]
