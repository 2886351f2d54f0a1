"""The sections of a run's config, and `RunConfig`, which has all of them.

Most sections are the dataclasses of components. The others, such as the choice of models, belong to
the run as a whole and are declared here. `cai_jax/pipeline/schema.py` converts configs to them.
"""

import dataclasses

from cai_jax.constitution import ConstitutionConfig
from cai_jax.data.prompts import PromptSource
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.config import FeedbackConfig, StageSampling
from cai_jax.model.quantized.kernel import FULL, check_format
from cai_jax.model.stacks import LAYOUTS
from cai_jax.model.weight_files import check_dtype
from cai_jax.pipeline.preference_config import PolicyConfig, RewardConfig
from cai_jax.runtime.compilation import CompilationConfig
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.manifest import VERSION, check_version
from cai_jax.runtime.settings import setting
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.remote import RemoteConfig
from cai_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class ModelSelection:
  """The models of a run: each is an embedded model, a checkpoint folder or a hub name.

  The embedded models are 'tiny', 'tiny-1', 'tiny-2' and 'tiny-small'.

  Raises:
    UserError: if the dtype or the format of weights is not supported, or `layers` is unknown.
  """

  base: str = setting(
    'tiny', "M_θ, which samples the initial responses. Must be '' if remote.base is set.", path=True
  )
  critique: str = setting('', "M_critique, which samples the critiques. '' means M_θ.", path=True)
  revision: str = setting('', "M_revise, which samples the revisions. '' means M_θ.", path=True)
  init: str = setting('', "Model that fine-tuning starts from. '' means M_θ.", path=True)
  aligned: str = setting(
    '',
    'M_aligned to evaluate. If it is set, the evaluate stage needs neither the generate nor the '
    "train stage. '' means the model that the train stage saves.",
    path=True,
  )
  dtype: str = setting(
    'float32', "Dtype of parameters, cache and computation in sampling, such as 'bfloat16'."
  )
  weights: str = setting(
    FULL,
    "Format of the linear layers' kernels in every model that this section names, when it samples "
    'or is measured. Raters, judges and guards are in full precision unless they are M_θ. '
    "'full' is `dtype`, 'int8' has 8 bits a weight with a scale for each output "
    "channel, and 'nf4' is the 4-bit format of QLoRA. Training has `train.base_weights`.",
    added=True,
  )
  long_context: bool = setting(
    False,
    'Whether models with longrope scaling, such as Phi-3, use their long factors and whole '
    'context, and not their short factors and original context. All models of this section must '
    'have that scaling.',
    added=True,
  )
  layers: str = setting(
    'unrolled',
    "How the train step contains the layers: 'unrolled' compiles each layer, 'scan' compiles those "
    'of the same form once, which is meant for deep models. Checkpoints are the same, so a '
    'run may be resumed with the other value; only rounding differs. Sampling is not affected.',
    added=True,
  )

  def __post_init__(self) -> None:
    check_dtype(self.dtype, 'model.dtype')
    check_format(self.weights, 'model.weights')
    if self.layers not in LAYOUTS:
      raise UserError(f'model.layers={self.layers!r} is not one of {tuple(LAYOUTS)}.')


@dataclasses.dataclass(frozen=True)
class RemoteModels:
  """Models behind an OpenAI-compatible completions API: M_θ, M_critique and M_revise.

  Each replaces the field of the same name in `model`. With `remote.base.url`, set `model.base=''`,
  and name the model to fine-tune as `model.init`.
  """

  base: RemoteConfig | None = None
  critique: RemoteConfig | None = None
  revision: RemoteConfig | None = None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Number of devices along each axis of the mesh. One may be -1, for all remaining devices."""

  data: int = setting(-1, 'Devices that split the batch and replicate the parameters.')
  fsdp: int = setting(1, 'Devices that split both the batch and the parameters.')
  tensor: int = setting(1, 'Devices that split only the parameters.')
  expert: int = setting(1, 'Devices that split only the experts of each layer.', added=True)
  sequence: int = setting(
    1,
    'Devices that split the tokens of each row in training, and the parameters. Sampling counts '
    'them as `data`.',
    added=True,
  )


@dataclasses.dataclass(frozen=True)
class SamplingMesh:
  """The mesh of a replica: of the devices that hold one copy of the models that sample.

  Each replica samples prompts of its own. By default, each process is a replica, and its devices
  along each axis follow from `mesh`.

  Raises:
    UserError: if a number is out of range.
  """

  processes: int = setting(
    1,
    'Processes of a replica. A model that one process cannot hold is split over several. -1 means '
    'all processes of the run.',
    added=True,
  )
  data: int = setting(0, 'Devices that split the slots. 0 follows from `mesh`.', added=True)
  fsdp: int = setting(
    0, 'Devices that split both the slots and the parameters. 0 follows from `mesh`.', added=True
  )
  tensor: int = setting(
    0, 'Devices that split only the parameters. 0 means `mesh.tensor`.', added=True
  )
  expert: int = setting(
    0, 'Devices that split only the experts of each layer. 0 means `mesh.expert`.', added=True
  )

  def __post_init__(self) -> None:
    if self.processes != -1 and self.processes < 1:
      raise UserError(f'mesh_sampling.processes={self.processes} must be -1 or at least 1.')
    for name, size in self.axes.items():
      if size < -1:
        raise UserError(f'mesh_sampling.{name}={size} must be -1, 0 or positive.')

  @property
  def axes(self) -> dict[str, int]:
    """The number of devices along each axis; 0 follows from the mesh of training."""
    return {name: getattr(self, name) for name in ('data', 'fsdp', 'tensor', 'expert')}


@dataclasses.dataclass(frozen=True)
class PromptSets:
  """The prompts of a run.

  Responses to `harmful` prompts are critiqued and revised. `helpful` prompts are only answered, for
  `train.helpfulness_share`. `eval_harmful` and `eval_helpful` are held out for the evaluation; none
  of them may occur among the training prompts.
  """

  harmful: PromptSource = PromptSource()
  helpful: PromptSource = PromptSource()
  eval_harmful: PromptSource = PromptSource()
  eval_helpful: PromptSource = PromptSource()


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The dataset that the train stage reads."""

  d_cai: str = setting(
    '',
    'Folder of a D_CAI that another run wrote, to train on. If it is set, the train stage does not '
    "need the generate stage. '' means d_cai/ in the folder of this run.",
    path=True,
  )


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """The report of a run.

  Raises:
    UserError: if `chains` is negative.
  """

  chains: int = setting(500, "Number of chains in the report's browser.")
  published: str = setting(
    '',
    'A *_SLMADISON.jsonl file of samples that Bai et al. (2022) published. The report shows their '
    "rates of defects beside those of this run. '' means none.",
    path=True,
  )

  def __post_init__(self) -> None:
    if self.chains < 0:
      raise UserError(f'report.chains={self.chains} must be at least 0.')


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Every setting of a run.

  Raises:
    UserError: if the seed or the version is out of range.
  """

  version: int = setting(
    VERSION, 'Version of the config. A version that is newer than the program is an error.'
  )
  seed: int = setting(
    0,
    'Seed of sampling, of the draw of principles and of the order of examples, in [0, 2**63).',
    most=2**63 - 1,
  )
  plugins: tuple[str, ...] = setting(
    (),
    'Python files to import first. They can register variants, scorers, measures, losses and model '
    'families, which other fields can then name.',
    path=True,
    copied=False,
  )
  model: ModelSelection = ModelSelection()
  remote: RemoteModels = RemoteModels()
  mesh: MeshConfig = MeshConfig()
  mesh_sampling: SamplingMesh = SamplingMesh()
  constitution: ConstitutionConfig = ConstitutionConfig()
  prompts: PromptSets = PromptSets()
  feedback: FeedbackConfig = FeedbackConfig()
  sampling: StageSampling = StageSampling()
  engine: EngineConfig = EngineConfig()
  data: DataConfig = DataConfig()
  train: TrainConfig = TrainConfig()
  label: LabelConfig = LabelConfig()
  reward: RewardConfig = RewardConfig()
  prefer: PolicyConfig = PolicyConfig()
  evaluation: EvaluationConfig = EvaluationConfig()
  report: ReportConfig = ReportConfig()
  compilation: CompilationConfig = CompilationConfig()

  def __post_init__(self) -> None:
    check_version(self.version, 'the config')
    if not 0 <= self.seed < 2**63:
      raise UserError(f'seed={self.seed} must be in [0, 2**63).')
