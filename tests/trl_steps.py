"""Train with the trainers of TRL, in an environment of their own, and write what they report.

`python -m tests.trl_steps REQUEST RESULT` reads a JSON file and writes another one. It imports
nothing of the package: an environment with torch, transformers, datasets and trl is enough.
`tests/test_preference_trl.py` starts it.
"""

import importlib.metadata
import json
import pathlib
import sys
import tempfile

import datasets
import torch
import transformers
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

PACKAGES = ('torch', 'transformers', 'trl')
IGNORED = -100  # label of a token that is not a target


class Tokenized:
  """A mixin for trainers that tokenize: the rows of the request are token ids already."""

  def _prepare_dataset(self, dataset, *args, **kwargs):
    return dataset


class TokenizedRows:
  """The same for the experimental trainers, which ask for each row."""

  def tokenize_row(self, feature, model=None):
    row = {'prompt_input_ids': feature['prompt_ids'], 'prompt_attention_mask': []}
    row['prompt_attention_mask'] = [1] * len(feature['prompt_ids'])
    for side in ('chosen', 'rejected'):
      tokens = feature['prompt_ids'] + feature[f'{side}_ids']
      row[f'{side}_input_ids'] = tokens
      row[f'{side}_attention_mask'] = [1] * len(tokens)
      row[f'{side}_labels'] = [IGNORED] * len(feature['prompt_ids']) + feature[f'{side}_ids']
    return row


class DPO(Tokenized, trl.DPOTrainer):
  """`DPOTrainer` on token ids."""


class KTO(Tokenized, trl.KTOTrainer):
  """`KTOTrainer` on token ids; its rows have the response of another prompt, too."""


class Reward(Tokenized, trl.RewardTrainer):
  """`RewardTrainer` on token ids."""


class ORPO(TokenizedRows, ORPOTrainer):
  """`ORPOTrainer` on token ids."""


class CPO(TokenizedRows, CPOTrainer):
  """`CPOTrainer` on token ids."""


CAUSAL, SCORES = (
  transformers.AutoModelForCausalLM,
  transformers.AutoModelForSequenceClassification,
)
TRAINERS = {  # → trainer on token ids, its config, the trainer as it is, the kind of model
  'dpo': (DPO, trl.DPOConfig, trl.DPOTrainer, CAUSAL),
  'kto': (KTO, trl.KTOConfig, trl.KTOTrainer, CAUSAL),
  'reward': (Reward, trl.RewardConfig, trl.RewardTrainer, SCORES),
  'orpo': (ORPO, ORPOConfig, ORPOTrainer, CAUSAL),
  'cpo': (CPO, CPOConfig, CPOTrainer, CAUSAL),
}


def train(request: dict) -> dict:
  """Return the losses and gradient norms of a trainer's steps, and its rows as it read them.

  Args:
    request: `trainer`, a key of TRAINERS; `folder` of the model; `options` of its config;
      `optimizer`, the arguments of AdamW; and `rows` of token ids or the `file` of a dataset.
  """
  on_tokens, config_class, as_it_is, model_class = TRAINERS[request['trainer']]
  model = model_class.from_pretrained(
    request['folder'], dtype=torch.float32, attn_implementation='eager', **request.get('model', {})
  )
  optimizer = torch.optim.AdamW(model.parameters(), **request['optimizer'])
  config = config_class(
    output_dir=tempfile.mkdtemp(),
    num_train_epochs=1,
    train_sampling_strategy='sequential',
    learning_rate=request['optimizer']['lr'],
    lr_scheduler_type='constant',
    max_grad_norm=1e9,  # so that the norm is reported and nothing is clipped
    bf16=False,
    gradient_checkpointing=False,
    logging_steps=1,
    save_strategy='no',
    report_to='none',
    disable_tqdm=True,
    use_cpu=True,
    dataloader_pin_memory=False,
    **request['options'],
  )
  if 'file' in request:
    trainer_class = as_it_is
    dataset = datasets.load_dataset('json', data_files=request['file'], split='train')
  else:
    trainer_class, dataset = on_tokens, datasets.Dataset.from_list(request['rows'])
  trainer = trainer_class(
    model,
    args=config,
    train_dataset=dataset,
    processing_class=transformers.AutoTokenizer.from_pretrained(request['folder']),
    optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
  )
  trainer.train()
  log = [entry for entry in trainer.state.log_history if 'loss' in entry]
  read = ('prompt_ids', 'chosen_ids', 'rejected_ids')
  columns = [name for name in read if name in trainer.train_dataset.column_names]
  return {
    'losses': [entry['loss'] for entry in log],
    'grad_norms': [entry['grad_norm'] for entry in log],
    'rows': [{name: row[name] for name in columns} for row in trainer.train_dataset],
    'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
  }


def main(request: str, result: str) -> None:
  """Read a list of requests, and write the list of results."""
  torch.set_num_threads(1)  # such small products take longer on several
  results = [train(one) for one in json.loads(pathlib.Path(request).read_text())]
  pathlib.Path(result).write_text(json.dumps(results))


if __name__ == '__main__':
  main(*sys.argv[1:])
