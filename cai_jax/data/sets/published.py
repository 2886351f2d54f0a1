"""The published sets: origin, licence, size and fields of each.

`python -m cai_jax.data.set_table docs/prompts.md` writes them as a table. Licences and sizes are
those that the publishers state, unless they are marked as unverified. Nothing of a set is contained
in this package.
"""

from cai_jax.data.row_form import RowForm
from cai_jax.data.sets.prompt_set import PromptSet, register_set

_HH_SEEN = 'anthropics/hh-rlhf@354e5c3'

register_set(
  'hh_red_team',
  PromptSet(
    title='HH-RLHF red-team attempts (Ganguli et al. 2022)',
    kind='harmful',
    licence='MIT',
    size='38,961',
    hub='Anthropic/hh-rlhf',
    repository='anthropics/hh-rlhf',
    file='red-team-attempts/red_team_attempts.jsonl.gz',
    options={'data_dir': 'red-team-attempts'},
    form=RowForm(
      fields=('transcript',),
      transcript=True,
      drop_answer=True,
      metadata={
        'category': ('tags',),
        'rating': ('rating',),
        'task': ('task_description',),
        'model_type': ('model_type',),
      },
      keep_ids=False,
    ),
    seen=f'{_HH_SEEN} (its README); unverified: that the file is one JSON array',
  ),
)
register_set(
  'hh_harmless',
  PromptSet(
    title='HH-RLHF harmless-base (Bai et al. 2022)',
    kind='harmful',
    licence='MIT',
    size='2,312 test; 42,537 train (unverified)',
    hub='Anthropic/hh-rlhf',
    repository='anthropics/hh-rlhf',
    file='harmless-base/train.jsonl.gz',
    splits=('train', 'test'),
    options={'data_dir': 'harmless-base'},
    form=RowForm(fields=('chosen',), keep_ids=False),
    seen=f'{_HH_SEEN} (test.jsonl.gz)',
  ),
)
register_set(
  'hh_helpful',
  PromptSet(
    title='HH-RLHF helpful-base (Bai et al. 2022)',
    kind='benign',
    licence='MIT',
    size='43,835 train, 2,354 test (unverified)',
    hub='Anthropic/hh-rlhf',
    repository='anthropics/hh-rlhf',
    file='helpful-base/train.jsonl.gz',
    splits=('train', 'test'),
    options={'data_dir': 'helpful-base'},
    form=RowForm(fields=('chosen',), keep_ids=False),
    seen=f'{_HH_SEEN} (its README)',
  ),
)
register_set(
  'xstest',
  PromptSet(
    title='XSTest (Röttger et al. 2024)',
    kind='both',
    licence='CC BY 4.0',
    size='450 (250 safe, 200 unsafe)',
    hub='Paul/XSTest',
    repository='paul-rottger/exaggerated-safety',
    file='xstest_prompts.csv',
    form=RowForm(
      fields=('prompt',),
      plain=True,
      metadata={'category': ('type',), 'label': ('label',), 'focus': ('focus',), 'note': ('note',)},
      keep_ids=False,
    ),
    seen='paul-rottger/exaggerated-safety@475f10b',
  ),
)
register_set(
  'strongreject',
  PromptSet(
    title='StrongREJECT (Souly et al. 2024)',
    kind='harmful',
    licence='MIT for its own prompts; those of earlier sets keep theirs',
    size='313',
    hub='walledai/StrongREJECT',
    repository='alexandrasouly/strongreject',
    file='strongreject_dataset/strongreject_dataset.csv',
    form=RowForm(
      fields=('forbidden_prompt', 'prompt'),
      plain=True,
      metadata={'category': ('category',), 'origin': ('source',)},
      keep_ids=False,
    ),
    gated=True,
    seen='filyp/ai-discomfort@d4b7ef5 (rows of a copy); unverified: the names of its columns',
  ),
)
register_set(
  'jailbreakbench',
  PromptSet(
    title='JailbreakBench, JBB-Behaviors (Chao et al. 2024)',
    kind='both',
    licence='MIT',
    size='100 harmful, 100 benign',
    hub='JailbreakBench/JBB-Behaviors',
    file='data/harmful-behaviors.csv',
    subsets=('behaviors',),
    splits=('harmful', 'benign'),
    form=RowForm(
      fields=('Goal',),
      plain=True,
      metadata={'category': ('Category',), 'behavior': ('Behavior',), 'origin': ('Source',)},
      keep_ids=False,
    ),
    seen='Azure/PyRIT@1299e90 (a reader), rahulb99/trustworthy-nlp@dfd9235 (an earlier file), '
    'Baisayan/hack@2b37da1 (a copy with names in lower case)',
  ),
)
register_set(
  'harmbench',
  PromptSet(
    title='HarmBench (Mazeika et al. 2024)',
    kind='harmful',
    licence='MIT',
    size='400 (200 standard, 100 contextual, 100 copyright)',
    hub='walledai/HarmBench',
    repository='centerforaisafety/HarmBench',
    file='data/behavior_datasets/harmbench_behaviors_text_all.csv',
    subsets=('standard', 'contextual', 'copyright'),
    form=RowForm(
      fields=('Behavior', 'prompt'),
      plain=True,
      context=('ContextString', 'context'),
      metadata={
        'category': ('SemanticCategory', 'category'),
        'function': ('FunctionalCategory',),
        'behavior': ('BehaviorID',),
        'tags': ('Tags', 'tags'),
      },
      keep_ids=False,
    ),
    gated=True,
    seen='busycalibrating/AdversariaLLM@e9b1241 (a copy of the file)',
  ),
)
register_set(
  'do_not_answer',
  PromptSet(
    title='Do-Not-Answer (Wang et al. 2024)',
    kind='harmful',
    licence='CC BY-NC-SA 4.0 in the repository, Apache-2.0 on the hub',
    size='939',
    hub='LibrAI/do-not-answer',
    repository='Libr-AI/do-not-answer',
    file='datasets/Instruction/do_not_answer_en.csv',
    form=RowForm(
      fields=('question',),
      plain=True,
      metadata={
        'category': ('types_of_harm',),
        'risk_area': ('risk_area',),
        'harm': ('specific_harms',),
      },
      keep_ids=False,
    ),
    seen='Azure/PyRIT@1299e90, promptfoo/promptfoo@01f2dd5 (readers)',
  ),
)
register_set(
  'wildjailbreak',
  PromptSet(
    title='WildJailbreak (Jiang et al. 2024)',
    kind='both',
    licence='ODC-By',
    size='261,559 in subset train, 2,210 in subset eval',
    hub='allenai/wildjailbreak',
    file='train/train.tsv',
    subsets=('train', 'eval'),
    # An empty cell stays an empty text. The files end in .tsv.
    options={'delimiter': '\t', 'keep_default_na': False},
    form=RowForm(
      fields=('adversarial', 'vanilla'),
      plain=True,
      metadata={'category': ('data_type',), 'label': ('label',)},
      keep_ids=False,
    ),
    gated=True,
    seen='allenai/wildteaming@0897f74 (eval.tsv); unverified: train.tsv',
  ),
)
register_set(
  'advbench',
  PromptSet(
    title='AdvBench, harmful behaviors (Zou et al. 2023)',
    kind='harmful',
    licence='MIT',
    size='520',
    hub='walledai/AdvBench',
    repository='llm-attacks/llm-attacks',
    file='data/advbench/harmful_behaviors.csv',
    form=RowForm(fields=('goal', 'prompt'), plain=True, keep_ids=False),
    gated=True,
    seen='ab235/AttnGCG-attack@3015d36 (a part of the file)',
  ),
)
register_set(
  'aya_redteaming',
  PromptSet(
    title='Aya red-teaming (Aakanksha et al. 2024)',
    kind='harmful',
    licence='Apache-2.0',
    size='7,419 in 8 languages; 987 English',
    hub='CohereLabs/aya_redteaming',
    file='aya_eng.jsonl',
    splits=(
      'english',
      'arabic',
      'filipino',
      'french',
      'hindi',
      'russian',
      'serbian',
      'spanish',
    ),
    form=RowForm(
      fields=('prompt',),
      plain=True,
      metadata={
        'category': ('harm_category',),
        'language': ('language',),
        'scope': ('global_or_local',),
      },
      keep_ids=False,
    ),
    seen='Azure/PyRIT@1299e90 (a reader), EleutherAI/lm-evaluation-harness@15190ac (a reader)',
  ),
)
register_set(
  'ultrachat',
  PromptSet(
    title='UltraChat 200k (Ding et al. 2023, Tunstall et al. 2023)',
    kind='benign',
    licence='MIT',
    size='207,865 train_sft, 23,110 test_sft, 256,032 train_gen, 28,304 test_gen',
    hub='HuggingFaceH4/ultrachat_200k',
    file='data/train_sft-*.parquet',
    splits=('train_sft', 'test_sft', 'train_gen', 'test_gen'),
    form=RowForm(fields=('messages',), drop_answer=True, keep_ids=False),
    seen='hub card of HuggingFaceH4/ultrachat_200k@8049631',
  ),
)
