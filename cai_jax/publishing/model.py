"""M_aligned as a repository of the hub: the model, its adapters, and its card."""

import pathlib

from huggingface_hub import ModelCardData

from cai_jax.model.folder import MODEL_FILES, folder_contents
from cai_jax.model.peft import CONFIG, FILES
from cai_jax.publishing import card
from cai_jax.publishing.files import link, write_run_files
from cai_jax.publishing.finished_run import FinishedRun
from cai_jax.publishing.kinds import KINDS, Kind, Request
from cai_jax.publishing.licences import Licence, find_model_licence, list_origins
from cai_jax.publishing.markdown import code, escape, table
from cai_jax.publishing.names import public_name
from cai_jax.report.numbers import GROUPS
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json, write_json

ADAPTER = 'adapter'
_SETS = (*card.TRAINING_SETS, 'eval_harmful', 'eval_helpful')
_NAMES = {'base': 'base model', 'aligned': 'this model', 'initial': 'initial response'}


def check_model(run: FinishedRun) -> None:
  """Check that a run has trained a model, and that it has not changed since.

  Args:
    run: the run.

  Raises:
    UserError: if it has none, or its files have changed.
  """
  if not run.has_done('train'):
    aligned = run.values['model']['aligned']
    reason = (
      f'it evaluates {public_name(aligned)}, which it has not trained'
      if aligned
      else 'its stage train is not done'
    )
    raise UserError(f'{run.folder} has no model to publish: {reason}.')
  folder, recorded = run.folder / 'model', run.entry('train').get('model')
  if not (folder / 'config.json').is_file():
    raise UserError(f'{folder} is missing. Put it back, or train again in another workdir.')
  if not recorded:
    raise UserError(
      f'{run.folder / "manifest.json"} has no digests of the model, because an old cai_jax trained '
      f'it. So nothing shows that {folder} is still that model. Train again in another workdir.'
    )
  changed = [part for part, d in folder_contents(folder).items() if recorded.get(part) != d]
  if changed:
    raise UserError(
      f'{folder} is not the model that stage train wrote: its {changed[0]} has changed, so the '
      'figures of the card would be those of another model. Restore it.'
    )
  _check_adapter(run)


def _check_adapter(run: FinishedRun) -> None:
  """Check that the adapters of a run are those that its training wrote."""
  folder, recorded = run.folder / ADAPTER, run.entry('train').get('adapter')
  if recorded is None and _has_adapter(run):
    raise UserError(
      f'{folder} has adapters of which the manifest has no digest, so they may be those of another '
      'model. Move the folder away to publish the model without them.'
    )
  if recorded and not (_has_adapter(run) and digest_files(folder, FILES) == recorded):
    raise UserError(f'{folder} does not have the adapters that stage train wrote. Restore them.')


def _has_adapter(run: FinishedRun) -> bool:
  return all((run.folder / ADAPTER / name).is_file() for name in FILES)


def find_licence(run: FinishedRun, request: Request) -> Licence:
  """Return the licence of the model: the one that the user gives, or that of what it starts from.

  Args:
    run: the run.
    request: what the user asks for.
  """
  own = find_model_licence(_start(run), run.is_hub_name(_start(run)))
  if request.licence is None:
    return own
  return request.licence._replace(source='the publisher of this model', files=own.files)


def write_model(run: FinishedRun, request: Request, licence: Licence, folder: pathlib.Path) -> None:
  """Write the model, its adapters, the files of the run and the card.

  Args:
    run: the run.
    request: what the user asks for.
    licence: the licence of the model.
    folder: an empty folder.
  """
  # Only what a saved model consists of: other files in its folder are the user's own.
  for path in sorted({f for pattern in MODEL_FILES for f in (run.folder / 'model').glob(pattern)}):
    link(path, folder / path.name)
  for file in licence.files:
    link(file, folder / file.name)
  if has_adapter := _has_adapter(run):
    link(run.folder / ADAPTER / FILES[1], folder / ADAPTER / FILES[1])
    settings = read_json(run.folder / ADAPTER / CONFIG)
    write_json(
      folder / ADAPTER / CONFIG, settings | {'base_model_name_or_path': public_name(_start(run))}
    )
  write_run_files(run, folder)
  text = f'---\n{_metadata(run, request, licence)}\n---\n\n{_body(run, request, licence)}\n'
  if has_adapter:
    text = text.replace('## How it was made', f'{_ADAPTERS}\n\n## How it was made', 1)
  (folder / 'README.md').write_text(text, encoding='utf-8')


_ADAPTERS = (
  "The folder `adapter/` has the LoRA adapters in PEFT's format. They belong to the base model: do "
  'not add them to this one, which contains them already.'
)


def _start(run: FinishedRun) -> str:
  """Return the name of the model that fine-tuning started from."""
  return run.values['model']['init'] or run.values['model']['base']


def _metadata(run: FinishedRun, request: Request, licence: Licence) -> str:
  start = _start(run)
  sets = card.TRAINING_SETS if run.has_done('generate') else ()
  hubs = [o.hub for name in sets for o in list_origins(run.values['prompts'][name]) if o.hub]
  data = ModelCardData(
    license=licence.id or None,
    license_name=licence.name or None,
    license_link=licence.link or None,
    language=list(request.languages) or None,
    base_model=start if run.is_hub_name(start) else None,
    base_model_relation='finetune' if run.is_hub_name(start) else None,
    datasets=sorted({*hubs}) or None,
    library_name='transformers',
    pipeline_tag='text-generation',
    tags=card.TAGS,
  )
  return data.to_yaml()


def _body(run: FinishedRun, request: Request, licence: Licence) -> str:
  values, start = run.values, _start(run)
  rounds = values['feedback']['rounds']
  made = f'It was trained on {card.describe_d_cai(run)}, which another run has generated'
  if run.has_done('generate'):
    made = (
      'A model answered prompts, and its answers were revised in '
      f'{rounds} round{"s" * (rounds != 1)} of the variant {code(values["feedback"]["variant"])} '
      'under the principles below. This model was trained on them'
    )
  intro = (
    f'{card.name_model(run, start)}, fine-tuned with the supervised phase of {card.PAPER}. {made} '
    f'({code("train.target")}: {code(values["train"]["target"])}).'
  )
  return '\n\n'.join(
    [
      f'# {request.repo.partition("/")[2]}',
      intro,
      _describe_use(run, request),
      card.describe_origin(run, _SETS),
      _describe_training(run),
      card.describe_constitution(run),
      card.describe_evaluation(run, _NAMES | _round_names(rounds), GROUPS),
      card.describe_worth(run),
      _describe_licence(card.name_model(run, start), licence),
    ]
  )


def _round_names(rounds: int) -> dict[str, str]:
  return {f'revision_{i}': f'revision of round {i}' for i in range(1, rounds + 1)}


def _describe_use(run: FinishedRun, request: Request) -> str:
  style = run.values['feedback']['style']
  lines = [
    'from transformers import AutoModelForCausalLM, AutoTokenizer',
    '',
    f"tokenizer = AutoTokenizer.from_pretrained('{request.repo}')",
    f"model = AutoModelForCausalLM.from_pretrained('{request.repo}')",
  ]
  if style == 'chat':
    lines += [
      "messages = [{'role': 'user', 'content': 'How do I apologize to a friend?'}]",
      'inputs = tokenizer.apply_chat_template(',
      "  messages, add_generation_prompt=True, return_dict=True, return_tensors='pt'",
      ')',
    ]
    note = ''
  else:
    lines.append("inputs = tokenizer(TEXT, return_tensors='pt')")
    note = (
      f'\n\nThe model was trained with the prompt format {code(style)} of cai_jax. `TEXT` is a '
      'prompt in that format.'
    )
  lines += [
    'reply = model.generate(**inputs, max_new_tokens=200)[0, inputs["input_ids"].shape[1] :]',
    'print(tokenizer.decode(reply, skip_special_tokens=True))',
  ]
  return '\n'.join(['## Use it', '', '```python', *lines, '```']) + note


def _describe_training(run: FinishedRun) -> str:
  entry, train = run.entry('train'), run.values['train']
  rows = [
    ['examples', f'{entry.get("examples", entry.get("rows_kept", 0)):,}'],
    ['target tokens of all epochs', f'{entry.get("tokens", 0):,.0f}'],
    ['epochs', f'{train["epochs"]:g}'],
    ['batch size', f'{train["batch_size"]:,} examples'],
    ['peak learning rate', f'{train["learning_rate"]:g}'],
    ['parameters trained', f'LoRA of rank {train["lora_rank"]}' if train['lora_rank'] else 'all'],
    ['step of this model', f'{entry.get("exported_step", "?")} of {entry.get("steps", "?")}'],
  ]
  return '### Training\n\n' + table(['', ''], rows)


def _describe_licence(name: str, licence: Licence) -> str:
  if not licence.id:
    return (
      f'## Licence\n\nUnknown: check the licence of {name} before you publish this model, and give '
      'yours with `--license`.'
    )
  texts = ', '.join(f'[{file.name}]({file.name})' for file in licence.files)
  return (
    f'## Licence\n\n{escape(licence.describe())}, according to {escape(licence.source)}. The base '
    f'model is {name}, whose conditions hold for this model too.'
    + (f' Its texts: {texts}.' if texts else '')
  )


KINDS.register('model')(Kind('model', check_model, find_licence, write_model))
