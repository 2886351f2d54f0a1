"""Run the training benchmark's steps with a model of Hugging Face transformers.

A step does what transformers' Trainer does. The loss of a micro-batch is summed over its target
tokens and divided by the number of targets in the whole step, gradients are clipped by their norm,
and the optimizer is torch's fused AdamW.
"""

import contextlib
import pathlib
from typing import Any

import torch
import transformers

from experiments.bench import examples as examples_lib
from experiments.bench.examples import Example, Rows

PACKAGES = ('torch', 'transformers')
IGNORED = -100  # label of a token that is not a target


class System:
  """A transformers model with its optimizer.

  A padded micro-batch has several examples, padded to the longest. A packed micro-batch has several
  rows joined into one without padding and without an attention mask. Its positions restart at each
  example, and transformers recognizes from them which tokens belong together.

  Args:
    folder: the model's folder.
    dtype: 'bfloat16' computes under autocast; parameters and moments are f32.
    platform: 'cpu' or 'cuda'.
    options: `packed`, `attention` ('sdpa' or 'eager') and `optimizer`.
  """

  def __init__(self, folder: pathlib.Path, dtype: str, platform: str, options: dict[str, Any]):
    self.device = 'cpu' if platform == 'cpu' else 'cuda'
    model = transformers.AutoModelForCausalLM.from_pretrained(
      folder, dtype=torch.float32, attn_implementation=options['attention']
    )
    self.model = model.to(self.device).train()
    self.packed = options['packed']
    self.autocast = dtype == 'bfloat16'
    settings = options['optimizer']
    self.clip_norm = settings['clip_norm']
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(),
      lr=settings['learning_rate'],
      betas=(settings['b1'], settings['b2']),
      eps=settings['eps'],
      weight_decay=settings['weight_decay'],
      fused=True,
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
      batch: rows of a micro-batch; 0 means the whole step.

    Returns:
      The loss of each step, and the number of tokens computed, padding included.
    """
    losses, places = [], 0
    for rows in self.steps[first:stop]:
      parts = examples_lib.split(rows, batch)
      batches = [self._pack(part) if self.packed else self._pad(part) for part in parts]
      losses.append(self._step(batches))
      places += sum(b['input_ids'].numel() for b in batches)
    return losses, places

  def _pad(self, rows: Rows) -> dict[str, torch.Tensor]:
    examples = [self.examples[i] for row in rows for i in row]
    tokens, real, targets = map(
      torch.tensor, examples_lib.pad(examples, max(len(e.tokens) for e in examples))
    )
    labels = torch.where(targets != 0, tokens, IGNORED)
    return {'input_ids': tokens.long(), 'attention_mask': real.long(), 'labels': labels.long()}

  def _pack(self, rows: Rows) -> dict[str, torch.Tensor]:
    tokens, labels, positions = [], [], []
    for example in (self.examples[i] for row in rows for i in row):
      tokens += example.tokens
      labels += [IGNORED] * example.prompt + example.tokens[example.prompt :]
      positions += range(len(example.tokens))
    arrays = {'input_ids': tokens, 'labels': labels, 'position_ids': positions}
    return {name: torch.tensor([ids]) for name, ids in arrays.items()}

  def _step(self, batches: list[dict[str, torch.Tensor]]) -> float:
    """Take an optimizer step over all micro-batches and return its loss."""
    num_targets = sum(int((b['labels'][:, 1:] != IGNORED).sum()) for b in batches)
    autocast = contextlib.nullcontext()
    if self.autocast:
      autocast = torch.autocast(self.device, torch.bfloat16)
    total = 0.0
    for arrays in batches:
      arrays = {name: x.to(self.device) for name, x in arrays.items()}
      with autocast:
        loss = self.model(**arrays, use_cache=False, num_items_in_batch=num_targets).loss
      loss.backward()
      total += loss.item()
    if self.clip_norm:
      torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return total

  def device_peak_bytes(self) -> int | None:
    """Return the peak memory of the accelerator in bytes, or None on a CPU."""
    return None if self.device == 'cpu' else torch.cuda.max_memory_allocated()
