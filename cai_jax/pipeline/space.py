"""The disk space that a run needs, and the folders that it writes to."""

import os
import pathlib
from collections.abc import Collection, Iterable
from typing import NamedTuple

from cai_jax.data.part_files import FOLDER
from cai_jax.model.config import ModelConfig
from cai_jax.pipeline import baselines, prompt_sets
from cai_jax.pipeline.label_turns import count_label_turns
from cai_jax.pipeline.pair_sources import PAIR_SOURCES
from cai_jax.pipeline.policies import list_policies
from cai_jax.pipeline.preference_config import PolicyConfig, RewardConfig
from cai_jax.pipeline.preference_sizes import measure_trainings, preference_texts
from cai_jax.pipeline.run import Run
from cai_jax.runtime.cloud import direct
from cai_jax.runtime.cloud.store import is_url
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import check_workdir, free_bytes
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.reference import FILE

JOURNAL_TOKEN_BYTES = 34  # of a sampled token: its id, its log-probability as text, and its letters
ROW_TOKEN_BYTES = 14  # of a sampled token in D_CAI, and in the files made from it
TURN_BYTES = 300  # of a turn besides its tokens
OTHER_BYTES = 20_000_000  # metrics, TensorBoard, the report and the manifest
FOLDERS = (
  'journal',
  'd_cai',
  'checkpoints',
  'examples',
  'model',
  'evaluation',
  'tensorboard',
  'profile',
  'costs',
  'labels',
  'prefer',
  'reward_model',
  'policy',
  'policies',
  'best_of_n',
)


class Need(NamedTuple):
  """Disk space that a part of a run needs.

  Attributes:
    part: what the space is for.
    folder: where it is written.
    bytes: number of bytes, at most.
  """

  part: str
  folder: pathlib.Path
  bytes: int


def estimate_space(run: Run, stages: Collection[str], trained: ModelConfig | None) -> list[Need]:
  """Return the disk space that stages need, for the longest replies that the config allows.

  What the folders of the run hold already is subtracted, because a run that continues replaces it.

  Args:
    run: the run.
    stages: names of the stages that are not done.
    trained: shape of the model to fine-tune, or None.
  """
  turns, tokens, texts = _count_turns(run, stages)
  rows = turns * TURN_BYTES + tokens * ROW_TOKEN_BYTES + texts
  needs = [
    Need('journal', run.journal or run.workdir / 'journal', journal_bytes(turns, tokens)),
    Need('D_CAI and evaluation', run.workdir / 'd_cai', rows),
    Need('logs and report', run.workdir, OTHER_BYTES),
  ]
  if 'train' in stages and trained is not None:
    folders = run.workdir, run.workdir / 'model'
    needs += _training_space(run.config.train, trained.num_params, *folders)
    if run.config.data.d_cai:  # ROW_TOKEN_BYTES has what is made from a D_CAI of this run
      needs.append(Need('examples', run.workdir / FOLDER, _folder_bytes(run.d_cai)))
  for size in measure_trainings(run) if 'prefer' in stages else ():
    training, folder = size.training, run.workdir / size.training.workdir
    needs += _training_space(
      training.config, size.num_params, folder, run.workdir / training.folder
    )
    needs.append(Need('reference', folder / FILE, size.reference_bytes))
    needs.append(Need('units', folder / FOLDER, _pairs_bytes(run, training.config)))
  return [need._replace(bytes=max(0, need.bytes - _used_bytes(need, run))) for need in needs]


def _pairs_bytes(run: Run, config: PolicyConfig | RewardConfig) -> int:
  """Return the size of the tokens of comparisons that are read from given files.

  A token takes 4 bytes, which are about as many letters, and a prompt is there for both responses.
  ROW_TOKEN_BYTES has what is made from the texts that the run samples.
  """
  if config.data not in PAIR_SOURCES:
    return 2 * os.path.getsize(config.data) if os.path.isfile(config.data) else 0
  return _folder_bytes(run.d_cai) if run.config.data.d_cai else 0


def _training_space(
  config: FitConfig, num_params: int, workdir: pathlib.Path, model: pathlib.Path
) -> list[Need]:
  """Return the disk space of a training: its checkpoints in a folder, and the model.

  A checkpoint holds f32 parameters, two moments of each, and their average. Besides the kept ones,
  there is the best one, and one that is being written. Those in a store need no disk.
  """
  copies = (3 + bool(config.ema)) * (config.keep + 1 + bool(config.patience))
  if is_url(direct.place(workdir / 'checkpoints')):
    copies = 0
  return [
    Need('checkpoints', workdir / 'checkpoints', 4 * num_params * copies),
    Need('model', model, 4 * num_params),
  ]


def journal_bytes(turns: int, tokens: int) -> int:
  """Return the size of a journal of some turns with some tokens together."""
  return turns * TURN_BYTES + tokens * JOURNAL_TOKEN_BYTES


def _used_bytes(need: Need, run: Run) -> int:
  """Return the size of what a part has written already."""
  return 0 if need.folder == run.workdir else _folder_bytes(need.folder)


def _folder_bytes(folder: pathlib.Path) -> int:
  """Return the size of the files in a folder and below it; 0 if it does not exist."""
  return sum(
    os.path.getsize(path)
    for inner, _, names in os.walk(folder)
    for name in names
    if os.path.isfile(path := os.path.join(inner, name))
  )


def _count_turns(run: Run, stages: Collection[str]) -> tuple[int, int, int]:
  """Return the numbers of turns, of their tokens at most, and of bytes of prompts in the rows."""
  config = run.config
  samplings = [
    config.sampling.of_stage(stage, config.feedback.variant) for _, stage in config.feedback.plan()
  ]
  answer = config.sampling.initial
  turns = tokens = texts = 0
  for name in prompt_sets.NAMES:
    held_out = name in prompt_sets.HELD_OUT
    if ('evaluate' if held_out else 'generate') not in stages:
      continue
    count = len(run.prompts[name])
    copies = config.feedback.helpful_samples if name == 'helpful' else 1
    if held_out:  # base, aligned, the policies and the baselines
      copies = 2 + len(list_policies(config))
      copies += sum(baselines.num_answers(run, name) for name in config.evaluation.baselines)
    chain = [answer] if name.endswith('helpful') else samplings
    for sampling in [*chain, *[answer] * (copies - 1)]:
      turns += count * (2 if sampling.max_thought_tokens else 1)
      tokens += count * (sampling.max_tokens + sampling.max_thought_tokens)
    size = sum(len(m['content'].encode()) for p in run.prompts[name] for m in p.messages)
    texts += size * (copies + 1)
  count, room = 0, answer.max_tokens + answer.max_thought_tokens
  if 'label' in stages:
    label = count_label_turns(run)
    count += label.responses
    turns += label.questions * label.turns + label.judged
    tokens += label.questions * label.tokens
  if 'prefer' in stages:
    prompts = sum(len(run.prompts[name]) for name in prompt_sets.TRAINING)
    count += run.config.reward.best_of_n * prompts
  turns += count * (2 if answer.max_thought_tokens else 1)
  return turns, tokens + count * room, texts + preference_texts(run, stages)


def check_space(needs: Iterable[Need]) -> None:
  """Check that each filesystem has room for what is written to it.

  Args:
    needs: the disk space of the parts of a run, or of several runs.

  Raises:
    UserError: if a filesystem has too little free space.
  """
  by_device: dict[int, list[Need]] = {}
  for need in needs:
    folder = next(path for path in (need.folder, *need.folder.absolute().parents) if path.exists())
    by_device.setdefault(os.stat(folder).st_dev, []).append(need._replace(folder=folder))
  for group in by_device.values():
    needed, free = sum(need.bytes for need in group), free_bytes(group[0].folder)
    if free < needed:
      raise UserError(
        f'The disk of {group[0].folder} has {format_bytes(free)} free, and the run needs up to '
        f'{format_bytes(needed)}: {describe_space(group)}. Free some space, choose another disk, '
        'or lower train.keep, max_tokens or the number of prompts.'
      )


def describe_space(needs: Iterable[Need]) -> str:
  """Return the space of each part, such as 'journal 1.2 GB, model 0.5 GB'."""
  by_part: dict[str, int] = {}
  for need in needs:
    by_part[need.part] = by_part.get(need.part, 0) + need.bytes
  return ', '.join(f'{part} {format_bytes(count)}' for part, count in by_part.items())


def format_bytes(count: float) -> str:
  """Return a number of bytes in MB or GB."""
  return f'{count / 1e9:.1f} GB' if count >= 1e9 else f'{count / 1e6:.1f} MB'


def check_folders(run: Run) -> None:
  """Check that the run can write to its folder, to those in it, and to its journal.

  Raises:
    UserError: if it cannot; the message names the folder.
  """
  check_workdir(run.workdir)
  inner = [run.workdir / name for name in FOLDERS]
  for folder in [path for path in inner if os.path.lexists(path)] + [run.journal or run.workdir]:
    check_workdir(folder)
