"""Tiny random guard models: a chat template of each guard's form, and the family that it has.

The templates have the structure of the published ones, in words of our own: which messages they
read, which options they take, and how a prompt ends.
"""

import json

import transformers

from tests.families import make_config, randomize

POSITIONS = 1024
_TURNS = (
  '{% for m in messages %}{{ "User: " if m.role == "user" else "Agent: " }}'
  '{{ m.content | trim }}\n\n{% endfor %}'
)
_LAST = (
  '{% set question, answer = messages[-2].content, messages[-1].content %}'
  '<|im_start|>user\n{RULE}\nQuestion: {{ question | trim }}\nAnswer: {{ answer | trim }}'
  '<|im_end|>\n<|im_start|>assistant\n'
)
LLAMA_GUARD = (
  '<|im_start|>user\nFind unsafe content.\n\n<CATEGORIES>\nS1: Violent Crimes.\nS10: Hate.\n'
  '</CATEGORIES>\n\n' + _TURNS + '{{ "First line: safe or unsafe." }}<|im_end|>'
)
QWEN3GUARD = (
  '<|im_start|>user\nRate the last answer.\n\n' + _TURNS + '{{ "Three lines." }}<|im_end|>\n'
  '<|im_start|>assistant\n<think>\n\n</think>\n\n'
)
SHIELDGEMMA = _LAST.replace('{RULE}', '{{ "Our principle:" }}\n* {{ guideline }}')
GRANITE = _LAST.replace(
  '{RULE}',
  '{% set risk = guardian_config["{KEY}"] if guardian_config is defined else "harm" %}'
  'Is there {{ risk }}?{% if think is defined and think %} Think.{% endif %}',
)
WILDGUARD = 'Is it harmful?\n\nHuman:\n{prompt}\n\nAI:\n{response}\n\nAnswers:\n'

# Kind of guard → line of families.FAMILIES and chat template; None for one that a test makes.
FORMS = {
  'llama_guard_3': ('llama3', LLAMA_GUARD),
  'shieldgemma': ('gemma2', SHIELDGEMMA),
  'wildguard': ('mistral', None),
  'qwen3guard': ('qwen3', QWEN3GUARD),
  'granite_guardian': ('granite', GRANITE.replace('{KEY}', 'risk_name')),
  'granite_guardian_3_3': ('granite4', GRANITE.replace('{KEY}', 'criteria_id')),
}


def save_guard(kind, folder, tokenizer):
  """Save a tiny random guard as a Hugging Face folder.

  Args:
    kind: key of FORMS.
    folder: is created.
    tokenizer: the tiny tokenizer.
  """
  import torch

  family, template = FORMS[kind]
  end = tokenizer.eos_token_id
  ids = dict(bos_token_id=None, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
  config = make_config(family, max_position_embeddings=POSITIONS, **ids)
  with torch.random.fork_rng():
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
  randomize(model, list(FORMS).index(kind))
  model.generation_config = transformers.GenerationConfig(eos_token_id=end)
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)
  path = folder / 'tokenizer_config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'model_max_length': POSITIONS}))
  (folder / 'chat_template.jinja').unlink()
  if template is not None:
    (folder / 'chat_template.jinja').write_text(template)
