"""Run the training benchmark's steps with `SFTTrainer` of TRL, on all parameters.

The settings are the fastest ones that do not change the optimization: packed rows without padding
(`bfd`), no gradient checkpointing, torch's fused AdamW, and no evaluation, reports or checkpoints.
Rows are packed by the benchmark, so that each step has the same examples as ours; TRL's own packing
gives rows that are as full. The call to `train` includes what the trainer does around its steps.
"""

import itertools
import pathlib
import tempfile
from typing import Any

import datasets
import torch
import transformers
import trl

from experiments.bench import examples as examples_lib
from experiments.bench.examples import Example, Rows

PACKAGES = ('torch', 'transformers', 'trl', 'accelerate')
IGNORED = -100  # label of a token that is not a target


class System:
  """TRL's trainer with one model.

  Args:
    folder: the model's folder.
    dtype: 'bfloat16' computes under autocast; parameters and moments are f32.
    platform: 'cpu' or 'cuda'.
    options: `attention`, the model's attention implementation; `optimizer`.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    self.device = 'cpu' if platform == 'cpu' else 'cuda'
    settings = options['optimizer']
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation=options['attention']
    )
    optimizer = torch.optim.AdamW(
      model.parameters(),
      lr=settings['learning_rate'],
      betas=(settings['b1'], settings['b2']),
      eps=settings['eps'],
      weight_decay=settings['weight_decay'],
      fused=True,
    )
    config = trl.SFTConfig(
      output_dir=tempfile.mkdtemp(),
      packing=True,
      packing_strategy='bfd',
      max_length=None,
      dataset_kwargs={'skip_prepare_dataset': True},
      train_sampling_strategy='sequential',
      remove_unused_columns=False,
      per_device_train_batch_size=1,
      learning_rate=settings['learning_rate'],
      lr_scheduler_type='constant',
      max_grad_norm=settings['clip_norm'],
      bf16=dtype == 'bfloat16',
      gradient_checkpointing=False,
      max_steps=1,
      logging_steps=1,
      save_strategy='no',
      report_to='none',
      disable_tqdm=True,
      use_cpu=self.device == 'cpu',
      dataloader_pin_memory=self.device != 'cpu',
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    self.trainer = trl.SFTTrainer(
      model,
      args=config,
      train_dataset=datasets.Dataset.from_list([_pack([Example([1, 2], 1)])]),
      processing_class=transformers.AutoTokenizer.from_pretrained(folder),
      optimizers=(optimizer, schedule),
    )

  def take(self, examples: list[Example], steps: list[Rows]) -> None:
    """Store the examples, and the rows of each step."""
    self.examples, self.steps = examples, steps

  def warm(self, batch: int) -> int:
    """Train on one step and return 1: nothing is compiled, so shapes do not matter."""
    self.train(0, 1, batch)
    return 1

  def train(self, first: int, stop: int, batch: int) -> tuple[list[float], int]:
    """Train on steps [first, stop).

    Args:
      first, stop: range of steps.
      batch: rows of a micro-batch, which become one row without padding; 0 means the whole step.

    Returns:
      The loss of each step, and the number of tokens computed, which has no padding.
    """
    losses, places = [], 0
    parts = [examples_lib.split(rows, batch) for rows in self.steps[first:stop]]
    # One call takes steps of equally many micro-batches.
    for count, group in itertools.groupby(parts, len):
      packed = [
        _pack([self.examples[i] for row in part for i in row]) for step in group for part in step
      ]
      trainer = self.trainer
      trainer.train_dataset = datasets.Dataset.from_list(packed)
      trainer.args.gradient_accumulation_steps = count
      trainer.args.max_steps = len(packed) // count
      trainer.train()
      losses += [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]
      places += sum(len(row['input_ids']) for row in packed)
    return losses, places

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    return None if self.device == 'cpu' else torch.cuda.max_memory_allocated()


def _pack(examples: list[Example]) -> dict[str, list[int]]:
  """Return examples as a packed row of TRL."""
  return {
    'input_ids': [token for e in examples for token in e.tokens],
    'labels': [x for e in examples for x in [IGNORED] * e.prompt + e.tokens[e.prompt :]],
    'seq_lengths': [len(e.tokens) for e in examples],
  }
