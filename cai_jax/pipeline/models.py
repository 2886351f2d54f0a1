"""The models of a run, and the meshes that hold them."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh

from cai_jax.dialogue import Dialogue
from cai_jax.evaluation import suite
from cai_jax.evaluation.config import TRAINED
from cai_jax.evaluation.registries import ResponseMeasure
from cai_jax.model import lm as models
from cai_jax.model.lm import LM
from cai_jax.pipeline.policies import REWARD_MODEL, trains_reward
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.sections import MeshConfig, SamplingMesh
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import is_split, join_sequence, make_mesh
from cai_jax.sampling.remote import Remote
from cai_jax.scoring.judge_client import JudgeClient
from cai_jax.scoring.judge_server import JudgeServer
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.scorer import SCORERS, Scorer
from cai_jax.tiny.files import MODELS, model_path


def global_mesh(run: Run) -> Mesh:
  """Return the mesh of all processes' devices, on which training runs."""
  return make_mesh(**dataclasses.asdict(run.config.mesh))


def sampling_mesh(run: Run) -> Mesh:
  """Return the mesh of this process's replica: of the models that sample.

  A replica has the devices of as many consecutive processes as `mesh_sampling.processes` says. The
  axis `sequence` is for training: here its devices belong to `data`.

  Raises:
    UserError: if the processes, or the devices of a replica, do not divide evenly.
  """
  given, count = run.config.mesh_sampling, jax.process_count()
  processes = count if given.processes == -1 else given.processes
  if count % processes:
    raise UserError(
      f'mesh_sampling.processes={processes} does not divide the {count} processes of this run. Set '
      f'it to one of {[n for n in range(1, count + 1) if count % n == 0]}, or to -1 for all.'
    )
  sizes = sampling_axes(run.config.mesh, given, count)
  replica = jax.process_index() // processes
  devices = [device for device in jax.devices() if device.process_index // processes == replica]
  try:
    return make_mesh(**sizes, devices=devices)
  except UserError as error:
    raise UserError(f'mesh_sampling: {error}') from error


def sampling_axes(mesh: MeshConfig, sampling: SamplingMesh, processes: int) -> dict[str, int]:
  """Return the devices of a replica along each axis of its mesh; -1 stands for all others.

  Args:
    mesh: the mesh of training.
    sampling: what the config says of the mesh of sampling.
    processes: number of processes of the run.
  """
  sizes = join_sequence(dataclasses.asdict(mesh))
  if processes > 1 or sampling != SamplingMesh():
    sizes |= {'data': -1, 'fsdp': 1} if sizes['fsdp'] == 1 else {'data': 1, 'fsdp': -1}
  return sizes | {name: size for name, size in sampling.axes.items() if size}


def local_mesh(run: Run) -> Mesh:
  """Return the mesh of models that only score: the sampling mesh, if all of it is in this process.

  Otherwise each process has a mesh of its own devices, and scores alone.
  """
  mesh = sampling_mesh(run)
  return make_mesh(1, -1, devices=jax.local_devices()) if is_split(mesh) else mesh


@contextlib.contextmanager
def open_models(run: Run, weights: bool = True) -> Iterator[dict[str, LM | Remote]]:
  """Yield the models that sample, by role, and close connections to servers at the end.

  A model with several roles is loaded once.

  Args:
    run: the run.
    weights: whether to load parameters. Without them, a model can only render contexts.

  Yields:
    The models: 'base' is M_θ. 'critique' and 'revision' are present if they differ from M_θ.
  """
  config, mesh, remotes = run.config.model, sampling_mesh(run), run.remotes
  names = {
    role: name
    for role in ('base', 'critique', 'revision')
    if (name := getattr(config, role)) and (role == 'base' or name != config.base)
  }

  def load(name: str) -> LM:
    load_lm = models.describe
    if weights:
      load_lm = functools.partial(models.load, weights=config.weights)
    lm = load_lm(model_path(name), config.dtype, mesh, long_context=config.long_context)
    return dataclasses.replace(lm, name=name)

  with contextlib.ExitStack() as stack:
    served = {
      role: stack.enter_context(contextlib.closing(Remote(remote)))
      for role, remote in remotes.items()
    }
    loaded = {name: load(name) for name in dict.fromkeys(names.values())}
    yield {role: loaded[name] for role, name in names.items()} | served


def make_dialogue(run: Run, lm: LM) -> Dialogue:
  """Return the dialogue that renders the run's conversations for a model.

  Args:
    run: the run, which has the prompt format and its options.
    lm: the model, which has the tokenizer.
  """
  feedback = run.config.feedback
  return Dialogue(lm.tokenizer, feedback.style, lm.eos_token_ids, feedback.template_options)


def answers_journal(run: Run, role: str) -> pathlib.Path:
  """Return the folder in which the answers of a served judge or guard model are stored.

  Args:
    run: the run.
    role: 'judge' or 'guard'.
  """
  return (run.journal or run.workdir / 'journal') / role


def open_client(run: Run, server: JudgeServer, role: str) -> JudgeClient:
  """Return what asks a served judge or guard model, and keeps its answers in the run's journal.

  Args:
    run: the run.
    server: the model's address and settings.
    role: 'judge' or 'guard'.
  """
  return JudgeClient(server, answers_journal(run, role), jax.process_index())


def judge_journal(run: Run) -> pathlib.Path:
  """Return the folder in which the answers of a served judge are stored."""
  return answers_journal(run, 'judge')


def guard_journal(run: Run) -> pathlib.Path:
  """Return the folder in which the answers of a served guard model are stored."""
  return answers_journal(run, 'guard')


def model_loader(
  run: Run, inspect_only: bool = False, loaded: Mapping[str, LM] | None = None
) -> ModelLoader:
  """Return the loader of the models that scorers and measures use.

  For language models, 'base' means M_θ, unless a server holds it.

  Args:
    run: the run.
    inspect_only: whether the loader checks models instead of loading them.
    loaded: language models that are in memory already, by the name in `config.model`.
  """
  aliases = {name: str(folder) for name, folder in MODELS.items()}
  if run.config.model.base:
    aliases['base'] = model_path(run.config.model.base)
  trained = {TRAINED: str(run.workdir / REWARD_MODEL)} if trains_reward(run.config) else {}
  feedback, journal = run.config.feedback, run.journal or run.workdir / 'journal'
  return ModelLoader(
    run.config.model.dtype,
    local_mesh(run),
    aliases,
    feedback.template_options,
    inspect_only,
    feedback.style,
    functools.partial(open_client, run),
    run.config.model.long_context,
    {model_path(name): lm for name, lm in (loaded or {}).items()},
    journal / 'ratings',
    trained,
    run.config.model.weights,
  )


def load_scorer(run: Run) -> Scorer | None:
  """Return the scorer that `evaluation.scorer` names, or None if it is 'none'."""
  return SCORERS[run.config.evaluation.scorer](model_loader(run))


def load_measures(run: Run) -> list[ResponseMeasure]:
  """Return the measures of responses that the config asks for, with their models loaded."""
  return suite.load_response_measures(run.config.evaluation, model_loader(run))
