"""Checks of served models before the first stage of a run starts."""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from cai_jax.dialogue import ChatDialogue, Dialogue, Message, control_tokens
from cai_jax.feedback.job import make_dialogue
from cai_jax.feedback.labels import probe_labels
from cai_jax.feedback.stage import THOUGHTS, Stage, check_thinks, thought_sampling
from cai_jax.pipeline import prompt_sets
from cai_jax.pipeline.costs import GUARD, JUDGE, write_test_costs
from cai_jax.pipeline.evaluation_checks import labelled_pairs
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.served_raters import find_served_rater
from cai_jax.pipeline.served_stages import ServedStage, served_stages
from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.terminal import say
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.scoring.guards.guard import GUARDS
from cai_jax.scoring.guards.served import check_served
from cai_jax.scoring.judge_remote import check_judge

PROBE = ({'role': 'user', 'content': 'Name three things in a kitchen.'},)


def check_servers(run: Run, stages: Sequence[str], log: Callable[[str], None] = say) -> Run:
  """Check that each server serves its model and answers requests like those of the run.

  All processes call this function together.

  Args:
    run: the run.
    stages: names of the stages that use the servers.
    log: called with a line of text if a server refuses seeds.

  Returns:
    The run, with seed='server' for each server that refuses seeds.

  Raises:
    UserError: if a check fails; the message names the server's section of the config.
  """
  refused = processes.run_on_all_processes('reach the servers', lambda: _check_all(run, stages))
  if jax.process_count() > 1:
    refused = multihost_utils.process_allgather(refused).any(0)
  remotes = {}
  for (role, remote), refuses in zip(run.remotes.items(), refused, strict=True):
    remotes[role] = remote
    if refuses and remote.seed == 'turn':
      remotes[role] = dataclasses.replace(remote, seed='server')
      log(
        f'remote.{role}: the server refuses seeds, so its random draws are its own. The journal '
        'keeps its texts, but another run gets other texts.'
      )
  section = dataclasses.replace(run.config.remote, **remotes)
  return dataclasses.replace(run, config=dataclasses.replace(run.config, remote=section))


def check_judge_server(run: Run) -> None:
  """Check that the server of the judge answers its longest labelled pair as the run needs it.

  Args:
    run: a run with `evaluation.judge_remote`.

  Raises:
    UserError: if the check fails.
  """
  config = run.config.evaluation
  assert config.judge_remote is not None, 'the run has no served judge'
  try:
    usage = check_judge(config.judge_remote, labelled_pairs(config), config.judge_reasoning)
    write_test_costs(run, JUDGE, [usage])
  except UserError as error:
    raise UserError(f'evaluation.judge_remote: {error}') from error


def check_guard_server(run: Run) -> None:
  """Check that the server of a guard answers the longest held-out prompt in the guard's form.

  Args:
    run: a run with `evaluation.guard_remote`.

  Raises:
    UserError: if the check fails.
  """
  prompts = [prompt.messages for name in prompt_sets.HELD_OUT for prompt in run.prompts[name]]
  longest = _longest(prompts)
  for kind, server in run.config.evaluation.served_guards.items():
    try:
      write_test_costs(run, GUARD, check_served(GUARDS[kind], server, longest))
    except UserError as error:
      raise UserError(f'evaluation.guard_remote, {kind!r}: {error}') from error


def check_rater_server(run: Run) -> None:
  """Check that a served rater rates a candidate of about the largest length.

  The candidate stands after the longest prompt that is revised.

  Args:
    run: a run whose variant has a served rater.

  Raises:
    UserError: if the check fails.
  """
  found = find_served_rater(run.config)
  assert found is not None, 'the run has no served rater'
  prompts = [p.messages for name in ('harmful', 'eval_harmful') for p in run.prompts[name]]
  candidate = 'word ' * run.config.sampling.revision.max_tokens
  name, question = found.name, found.name.question
  try:
    usages = found.kind.check(
      found.service, name.label, _longest(prompts), candidate.strip(), question
    )
    write_test_costs(run, found.kind.role, usages)
  except UserError as error:
    raise UserError(
      f'evaluation.{found.kind.role}_remote, which rates candidates: {error}'
    ) from error


def _longest(prompts: Sequence[Sequence[Message]]) -> Sequence[Message]:
  """Return the prompt with the most characters."""
  return max(prompts, key=lambda messages: sum(len(m['content']) for m in messages))


def _check_all(run: Run, stages: Sequence[str]) -> np.ndarray:
  """Check each server, and return whether it takes no seeds, bool[number of servers]."""
  seedless = []
  for role, remote in run.remotes.items():
    try:
      if remote.batch and jax.process_count() > 1:
        raise UserError(
          f'batch={remote.batch!r} needs a single process, which writes all requests. Start one.'
        )
      with contextlib.closing(Remote(remote)) as served:
        dialogue = make_dialogue(served, run.config.feedback)
        sampled = served_stages(run.config).get(role, {})
        if remote.prompt == 'text':
          _check_texts(run, stages, set(sampled), served.tokenizer)
        probes = _probes(sampled, dialogue, served.name)
        stops = dialogue.stop_token_ids, dialogue.stop_strings
        try:
          seedless.append(served.check(probes, stops).seed == 'server')
        finally:
          write_test_costs(run, role, served.test_usage)
    except UserError as error:
      raise UserError(f'remote.{role}: {str(error).removeprefix("remote: ")}') from error
  return np.array(seedless, bool)


def _probes(
  stages: Mapping[str, ServedStage], dialogue: Dialogue | ChatDialogue, name: str
) -> list[Turn]:
  """Return a turn for each kind of request that a server gets in the run.

  Args:
    stages: the stages that its model samples.
    dialogue: renders messages for the model.
    name: name of the model.
  """
  context, sent = dialogue.prompt(PROBE), dialogue.messages(PROBE)
  probes: dict[SamplingConfig, Turn] = {}
  for stage, (sampling, chooses) in stages.items():
    if chooses:
      probes[sampling] = probe_labels(Stage('base', dialogue, sampling), stage, PROBE)
      continue
    if sampling.max_thought_tokens:
      check_thinks(dialogue, sampling, f'sampling.{stage}', name)
      assert isinstance(dialogue, Dialogue)  # a chat-only model has no thoughts here
      limited = thought_sampling(sampling, dialogue)
      probes[limited] = Turn(stage + THOUGHTS, context, limited)
    probes[sampling] = Turn(stage, context, sampling, messages=sent)
  return list(probes.values())


def _check_texts(run: Run, stages: Sequence[str], turns: set[str], tokenizer: Any) -> None:
  """Check that no text of the run spells a control token, for a server that reads text.

  The server would read the text as that token. Texts of models can spell one too, which is found
  when they are sampled.
  """
  spelled = re.compile('|'.join(map(re.escape, control_tokens(tokenizer))) or r'(?!)')
  for place, text in _texts(run, stages, turns):
    if found := spelled.search(text):
      start = max(0, found.start() - 30)
      raise UserError(
        f'{place} spells the control token {found[0]!r} ({show(text[start : start + 80])}), which '
        "the server would read as that token, because prompt='text'. Use a server that supports "
        "prompt='tokens', or change or remove the text."
      )


def _texts(run: Run, stages: Sequence[str], turns: set[str]) -> Iterator[tuple[str, str]]:
  """Yield (place, text) of each text that a server of some turns reads."""
  for name in prompt_sets.NAMES:
    if ('evaluate' if name in prompt_sets.HELD_OUT else 'generate') not in stages:
      continue
    for prompt in run.prompts[name]:
      for message in prompt.messages:
        yield f'prompts.{name}: {prompt}', message['content']
  if turns - {'initial'}:
    for principle in run.constitution.principles:
      for text in (principle.critique_request, principle.revision_request):
        yield f'constitution, principle {principle.id!r}', text
    for demonstration in (
      run.constitution.demonstrations if run.config.feedback.demonstrations else ()
    ):
      for message in demonstration:
        yield 'constitution, a demonstration', message['content']
