"""Sample the chains of a job and write D_CAI, one shard at a time."""

import contextlib
import functools
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from cai_jax.data import d_cai
from cai_jax.data.ended import describe_ended, read_ended, write_ended
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.contexts import smallest_context_limit
from cai_jax.feedback.forward import forward
from cai_jax.feedback.job import Job
from cai_jax.feedback.score import answer_scores, journaled_rates
from cai_jax.feedback.shards import claim_shards
from cai_jax.feedback.stage import ChainEnded
from cai_jax.feedback.waiting import end_waiting, has_batch, set_aside
from cai_jax.runtime import interruption
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.replicas import Replica, exit_alone, find_replica
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import DEFERRED, Engine
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.remote.costs import CostsByModel, sum_usage
from cai_jax.sampling.stats import Stats
from cai_jax.sampling.types import Chain, Completion, Turn, Usage
from cai_jax.sampling.usage import no_usage


class _Outcome(NamedTuple):
  """How a chain ended: with a row, or early; and what servers counted for it, by model."""

  row: dict[str, Any] | ChainEnded
  usages: list[tuple[str, Usage]]


def generate_shards(
  job: Job,
  folder: str | os.PathLike,
  journal: Journal,
  engine: EngineConfig,
  progress: Callable[[int, int, int], None] = lambda done, total, tokens: None,
  write_costs: Callable[[int, CostsByModel], None] = lambda shard, costs: None,
) -> dict[str, Any]:
  """Sample the missing shards of D_CAI, and return counts and speeds.

  Existing shards are kept. All processes must call this function together, with the same shared
  folder and journal. Each replica of the models samples an equal part of the missing shards. It
  reads the journal files of all replicas, so a later start, with any number of them, can finish the
  work of one that was lost. The bytes of a shard depend on the job alone. Call `finish_dataset`
  afterwards.

  Args:
    job: what to sample.
    folder: the folder of the dataset.
    journal: stores finished turns and replays them.
    engine: sizes of the compiled programs.
    progress: called after each row with the number of finished rows and the number of rows, both
      of this replica, and the number of sampled tokens.
    write_costs: called with the index of each shard, before it is written, and with what servers
      counted for all turns of its chains, whenever they were sampled.

  Returns:
    Counts and speeds of this process, and `expert_usage`, from `Engine.expert_usage`. Only the
    leader of a replica counts anything.

  Raises:
    UserError: if the folder holds another job's shards, or this process does not share it.
    WaitingError: if chains wait for a batch. Its requests are written, and complete shards too.
  """
  folder, models = pathlib.Path(folder), job.sampled_models
  size, num_rows = job.config.shard_rows, len(job.prompts)
  replica = find_replica(models.values())
  shards = {
    shard: range(shard * size, min((shard + 1) * size, num_rows))
    for shard in claim_shards(folder, job, replica)
  }
  nothing: dict[str, Any] = {'rows': num_rows, 'sampled_rows': 0, **Stats().summary()}
  nothing['expert_usage'] = no_usage(models)
  if not shards:
    return nothing

  def write(shard: int, outcomes: Mapping[int, _Outcome]) -> None:
    write_costs(shard, sum_usage(u for outcome in outcomes.values() for u in outcome.usages))
    _write_shard(job, folder, shard, {i: outcome.row for i, outcome in outcomes.items()})

  failures: list[str] = []
  with _sampling(replica):
    running = _make_engine(job, journal, engine)
    deferred = _sample_shards(job, journal, running, shards, write, failures, progress)
    usage = running.expert_usage()
  if deferred:
    end_waiting(models, deferred, failures)
  sampled = {'sampled_rows': sum(map(len, shards.values())), 'expert_usage': usage}
  return nothing | running.stats.summary() | sampled if replica.leads else nothing


@contextlib.contextmanager
def _sampling(replica: Replica) -> Iterator[None]:
  """Mark the sampling of a replica, which is the work of one process or of several in lock step."""
  with exit_alone(replica) if replica.is_split else interruption.local_work():
    yield


def _sample_shards(
  job: Job,
  journal: Journal,
  engine: Engine,
  shards: Mapping[int, range],
  write: Callable[[int, Mapping[int, _Outcome]], None],
  failures: list[str],
  progress: Callable[[int, int, int], None],
) -> int:
  """Sample the rows of some shards, and write each shard when it is complete.

  Args:
    job: what to sample.
    journal: has the ratings of candidates.
    engine: samples the chains.
    shards: the indices of the rows of each shard.
    write: called in the leader of the replica with the index of a shard, and the result of each of
      its chains by row.
    failures: gets a message for each chain that fails, if there is a batch.
    progress: as for `generate_shards`.

  Returns:
    The number of chains that have not finished, because they wait for a batch or have failed.
  """
  unwritten: dict[int, dict[int, _Outcome]] = {shard: {} for shard in shards}
  indices = [index for rows in shards.values() for index in rows]
  done = deferred = 0
  for _, result in engine.run(_chains(job, journal, indices, failures)):
    if result is DEFERRED:
      deferred += 1
      continue
    index, outcome = result
    shard = index // job.config.shard_rows
    unwritten[shard][index] = outcome
    if len(unwritten[shard]) == len(shards[shard]):
      complete = functools.partial(write, shard, unwritten.pop(shard))
      engine.lock_step.lead(complete)
    done += 1
    progress(done, len(indices), engine.stats.sampled_tokens)
  return deferred


def _write_shard(
  job: Job, folder: pathlib.Path, shard: int, rows: Mapping[int, dict | ChainEnded]
) -> None:
  """Write a shard, and before it a file of the chains that ended without a row."""
  ended, kept = [], []
  for index, row in sorted(rows.items()):
    if isinstance(row, ChainEnded):
      prompt, kind = job.prompts[index]
      ended.append({'id': prompt.id, 'kind': kind, 'turn': row.turn, 'reason': row.reason})
    else:
      kept.append(row)
  write_ended(folder, shard, ended)
  flags = job.has_thoughts, job.has_unknown_ids, job.has_details
  d_cai.write_shard(folder, shard, kept, *flags)


def finish_dataset(job: Job, folder: str | os.PathLike) -> None:
  """Write the metadata that turns the shards into one TFDS dataset.

  Only one process may call this function, after `generate_shards` has returned in every process.

  Args:
    job: the job whose shards are complete.
    folder: the folder of the dataset.

  Raises:
    UserError: if a shard is missing, or every chain ended without a row.
  """
  size, count = job.config.shard_rows, len(job.prompts)
  lengths = [
    min(size, count - start) - len(read_ended(folder, shard))
    for shard, start in enumerate(range(0, count, size))
  ]
  if not any(lengths):
    ended = describe_ended(folder, count, (prompt for prompt, _ in job.prompts))
    raise UserError(
      f'No row remains. {ended} Change what that turn reads, such as the '
      'prompts, the model or its chat template, and start in another workdir.'
    )
  flags = job.has_thoughts, job.has_unknown_ids, job.has_details
  d_cai.write_metadata(folder, lengths, *flags)
  d_cai.write_checksums(folder)


def replay_turns(
  job: Job, journal: Journal, engine: EngineConfig
) -> dict[str, list[tuple[Turn, Completion]]]:
  """Return the turns of each chain of a sampled job, with their exact token ids.

  The turns come from the journal. One that is not there is sampled again, with the same result.

  Args:
    job: the job.
    journal: the journal that has its turns.
    engine: sizes of the compiled programs.

  Returns:
    The turns and their completions by prompt id, in order.

  Raises:
    WaitingError: if a turn is not in the journal and waits for a batch.
  """
  turns: dict[str, list[tuple[Turn, Completion]]] = {}
  rate = journaled_rates(job.rater, journal)

  def recorded(prompt: Prompt, kind: str) -> Chain:
    taken = turns.setdefault(prompt.id, [])

    def answer(turn: Turn) -> Chain:
      completion = yield turn
      taken.append((turn, completion))
      return completion

    try:
      yield from forward(answer_scores(job.chain(prompt, kind), rate), answer)
    except ChainEnded:
      return

  with _sampling(find_replica(job.sampled_models.values())):
    chains = ((prompt.id, recorded(prompt, kind)) for prompt, kind in job.prompts)
    results = [result for _, result in _make_engine(job, journal, engine).run(chains)]
  if deferred := results.count(DEFERRED):
    end_waiting(job.sampled_models, deferred)
  return turns


def _make_engine(job: Job, journal: Journal, config: EngineConfig) -> Engine:
  stages = job.stages.by_name().values()
  return Engine(
    job.sampled_models,
    length=min(job.length + config.spare_tokens, smallest_context_limit(job.models)),
    seed=job.seed,
    config=config,
    journal=journal,
    stops={
      stage.model: (stage.dialogue.stop_token_ids, stage.dialogue.stop_strings) for stage in stages
    },
    prefixes=job.prefixes,
  )


def _chains(
  job: Job, journal: Journal, indices: Iterable[int], failures: list[str]
) -> Iterator[tuple[str, Chain]]:
  """Yield (prompt id, chain) for rows of D_CAI.

  A chain returns (index of its row, `_Outcome`). If there is a batch, one that fails does not end
  the run: it is `DEFERRED`, and `failures` gets a message.
  """
  rate, models = journaled_rates(job.rater, journal), job.sampled_models
  served = {name for name, model in models.items() if isinstance(model, Remote)}
  batched = has_batch(models)

  def row_chain(index: int, prompt: Prompt, kind: str) -> Chain:
    usages: list[tuple[str, Usage]] = []
    try:
      chain = answer_scores(job.chain(prompt, kind), rate)
      record = yield from _metered(chain, usages, served)
    except ChainEnded as ended:
      return index, _Outcome(ended, usages)
    return index, _Outcome(job.row(record, kind), usages)

  for index in indices:
    prompt, kind = job.prompts[index]
    chain = row_chain(index, prompt, kind)
    yield prompt.id, set_aside(chain, prompt.id, failures) if batched else chain


def _metered(chain: Chain, usages: list[tuple[str, Usage]], served: Collection[str]) -> Chain:
  """Return a chain that notes what servers counted for each turn, by the turn's model.

  Args:
    chain: the chain.
    usages: (model, usage) pairs, to which those of the chain are added. Journals of version
      0.1.0 have no counts; their turns count as answers that the server did not count.
    served: names of the served models.
  """

  def answer(turn: Turn) -> Chain:
    completion = yield turn
    if turn.model in served:
      usages.append((turn.model, completion.usage or Usage()))
    return completion

  return forward(chain, answer)
