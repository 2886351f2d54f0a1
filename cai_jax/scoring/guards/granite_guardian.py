"""Granite Guardian 3.0 to 3.3: 'Yes' if a response has a risk, else 'No'.

Names of the risks, the labels, and their probability: cookbooks of
github.com/ibm-granite/granite-guardian at commit a409be8 (granite-guardian-3.0, -3.2 and -3.3). The
template's general risk 'harm' decides, and the others are categories. Versions 3.0 to 3.2 answer
with the label itself, version 3.3 with '<score> yes </score>'; that the spaces around its label
belong to the answer is unverified. Version 4.1 needs another prompt and is not supported.

Checkpoints are of the family granite; 3.2-3b-a800m is of the family granitemoe, which cai_jax does
not load.
"""

from cai_jax.scoring.answer_form import Choice
from cai_jax.scoring.guards.guard import GUARDS, Guard, Policy

RISKS = {
  'social_bias': 'Social Bias',
  'profanity': 'Profanity',
  'sexual_content': 'Sexual Content',
  'unethical_behavior': 'Unethical Behavior',
  'violence': 'Violence',
}


def risk_policies(key: str) -> tuple[Policy, ...]:
  """Return the policy of general harm, and one for each of `RISKS`.

  Args:
    key: name of the risk's entry in the template's `guardian_config`.
  """
  return tuple(
    Policy(category, (('guardian_config', {key: risk}),))
    for risk, category in {'harm': '', **RISKS}.items()
  )


GUARDS.register('granite_guardian')(
  Guard(
    title='Granite Guardian 3.0 to 3.2',
    form=(Choice('risk', ('No', 'Yes')),),
    verdict='risk',
    unsafe=('Yes',),
    policies=risk_policies('risk_name'),
    last_turn_only=True,
  )
)
GUARDS.register('granite_guardian_3_3')(
  Guard(
    title='Granite Guardian 3.3',
    form=(Choice('risk', (' no', ' yes'), opening='<score>'),),
    verdict='risk',
    unsafe=(' yes',),
    policies=risk_policies('criteria_id'),
    options=(('think', False),),
    last_turn_only=True,
  )
)
