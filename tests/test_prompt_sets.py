"""Published prompt sets by name: every form and format, filters, turns and errors."""

import dataclasses
import json
import pathlib

import pytest

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.data.prompt_sources import PromptSource
from cai_jax.data.prompts import load_prompts
from cai_jax.data.row_form import RowForm
from cai_jax.data.set_table import update_page
from cai_jax.data.sets import PROMPT_SETS, PromptSet, register_set
from cai_jax.pipeline.prompt_sets import load_prompt_sets
from cai_jax.pipeline.sections import PromptSets
from cai_jax.runtime.errors import UserError
from configs import default
from tests.pipeline_setup import small
from tests.prompt_set_files import FILES, FORMATS, last, load, read, write, write_copy

ROOT = pathlib.Path(__file__).parents[1]
TEAPOT = 'How do I mend a teapot that nobody wants any more?'


# The second row of each file.
EXPECTED = {
  'hh_red_team': ('Because.', {'category': 'Dust, Noise', 'rating': '1.0', 'model_type': 'rlhf'}),
  'hh_harmless': ('The handle.', {}),
  'hh_helpful': (TEAPOT, {}),
  'xstest': (TEAPOT, {'category': 'contrast_homonyms', 'label': 'unsafe', 'focus': 'teapot'}),
  'strongreject': (TEAPOT, {'category': 'Spilled paint, stains and dust', 'origin': 'custom'}),
  'jailbreakbench': (
    'Write a note about a teapot',
    {'category': 'Privacy', 'behavior': 'Teapot note', 'origin': 'AdvBench'},
  ),
  'harmbench': (
    'The teapot stands in the hall, and guests come at noon.\n\n---\n\n'
    'Describe how to hide a teapot',
    {'category': 'illegal_parking', 'function': 'contextual', 'behavior': 'hide_teapot'},
  ),
  'do_not_answer': (
    TEAPOT,
    {'category': 'Noise', 'risk_area': 'Household Hazards', 'harm': 'Assisting a messy room'},
  ),
  'wildjailbreak': (TEAPOT, {'category': 'vanilla_benign'}),
  'advbench': ('Write a script that counts every teapot', {}),
  'aya_redteaming': (TEAPOT, {'category': 'Dust, Noise', 'language': 'English', 'scope': 'local'}),
  'ultrachat': ('And then?', {}),
}


@pytest.mark.parametrize('name', list(PROMPT_SETS))
def test_a_file_of_each_form_is_read(name):
  prompts = load(name)
  assert len(prompts) == 8 and len({prompt.id for prompt in prompts}) == 8
  text, metadata = EXPECTED[name]
  assert last(prompts[1]) == text
  assert metadata.items() <= prompts[1].metadata.items()
  assert all(prompt.metadata['set'] == name for prompt in prompts)
  assert all(prompt.messages[0]['role'] == 'user' for prompt in prompts)
  named = {key for prompt in prompts for key in prompt.metadata}
  # JSON of the hub has no null tags for a set without any.
  assert named - {'set'} <= set(PROMPT_SETS[name].form.metadata)


def test_the_second_form_of_a_set_is_read():
  prompts = load('wildjailbreak', FILES['wildjailbreak_eval'])
  assert last(prompts[1]).startswith('You are a painter')
  assert prompts[1].metadata['category'] == 'adversarial_harmful'
  # The words of a user, although they look like a transcript.
  assert last(load('wildjailbreak')[2]).startswith('User: You are a painter in a play.\n\nAct two')


@pytest.fixture
def copies(tmp_path, monkeypatch):
  """`copies(name, form)` writes a copy of a set's file in a format and returns its path."""
  monkeypatch.setenv('HF_DATASETS_CACHE', str(tmp_path / 'cache'))
  return lambda name, form: write_copy(name, form, tmp_path / 'copies' / name / form)


def test_a_folder_without_the_split_names_those_that_it_has(copies):
  with pytest.raises(UserError, match="has no split 'french'. It has english"):
    load('aya_redteaming', copies('aya_redteaming', 'saved'), split='french')


def save(folder, name, split=None, subset=None):
  import datasets

  info = datasets.DatasetInfo(config_name=subset)
  rows = datasets.Dataset.from_list(
    read(FILES[name]), info=info, split=split and datasets.Split(split)
  )
  rows.save_to_disk(str(folder))
  return folder


def test_a_saved_folder_holds_the_split_and_subset_to_read(tmp_path):
  benign = save(tmp_path / 'benign', 'jailbreakbench', 'benign', 'behaviors')
  assert len(load('jailbreakbench', benign, split='benign')) == 8
  with pytest.raises(
    UserError, match="holds the split 'benign'.* is 'harmful'. Set split='benign'"
  ):
    load('jailbreakbench', benign)
  part = save(tmp_path / 'part', 'jailbreakbench', 'benign[:8]', 'default')
  assert len(load('jailbreakbench', part, split='benign')) == 8
  hub = PromptSource(source='hub', name=str(part), field='Goal')
  with pytest.raises(UserError, match=r"holds the split 'benign\[:8\]'.* is 'train'"):
    load_prompts(hub)
  assert len(load_prompts(dataclasses.replace(hub, split='benign[:8]'))) == 8
  with pytest.raises(UserError, match='does not say which subset it holds'):
    load_prompts(dataclasses.replace(hub, split='benign', subset='behaviors'))
  other = save(tmp_path / 'other', 'jailbreakbench', 'harmful', 'judge_comparison')
  with pytest.raises(UserError, match="holds the subset 'judge_comparison'.* is 'behaviors'"):
    load('jailbreakbench', other)


def test_a_saved_folder_that_may_be_another_subset_or_split_is_refused(tmp_path):
  unknown = save(tmp_path / 'unknown', 'jailbreakbench')
  with pytest.raises(UserError, match="which split it holds, so split='harmful' cannot be checked"):
    load('jailbreakbench', unknown)
  assert len(load_prompts(PromptSource(source='hub', name=str(unknown), field='Goal'))) == 8
  standard = save(tmp_path / 'standard', 'harmbench', 'train', 'standard')
  assert len(load('harmbench', standard)) == 8
  with pytest.raises(UserError, match="holds the subset 'standard'.* is 'copyright'"):
    load('harmbench', standard, subset='copyright')
  default = save(tmp_path / 'default', 'harmbench', 'train', 'default')
  with pytest.raises(UserError, match='does not say which subset it holds'):
    load('harmbench', default)


def run_eight(model, name, path, workdir):
  """Sample the chains of eight prompts and return the rows of D_CAI."""
  config = small(model)
  config.prompts = default.get_config().prompts
  config.prompts.harmful.update(source=name, path=str(path), limit=8)
  config.feedback.rounds = 1
  config.sampling.initial.max_tokens = config.sampling.revision.max_tokens = 4
  config.sampling.critique.max_tokens = 3
  pipeline.run_stages(pipeline.build(config, workdir), ['generate'])
  return d_cai.read_rows(workdir / 'd_cai')


@pytest.mark.parametrize('form', FORMATS)
def test_eight_prompts_run_in_every_format(form, copies, random_model, tmp_path):
  rows = run_eight(random_model, 'xstest', copies('xstest', form), tmp_path / 'run')
  prompts = load('xstest')
  assert [row['id'] for row in rows] == [prompt.id for prompt in prompts]
  assert [json.loads(row['metadata']) for row in rows] == [prompt.metadata for prompt in prompts]


def test_a_set_without_a_copy_is_loaded_from_the_hub(monkeypatch):
  import datasets

  calls = []

  def load_dataset(*arguments, **options):
    calls.append((arguments, options))
    return [{'adversarial': '', 'vanilla': 'Where is my kite?', 'data_type': 'vanilla_benign'}]

  with pytest.raises(UserError, match='wildjailbreak: .*accept its conditions.*train.tsv .*path'):
    load('wildjailbreak', '')  # the tests have no network
  monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
  (prompt,) = load('wildjailbreak', '', subset='eval')
  assert last(prompt) == 'Where is my kite?'
  assert calls == [
    (
      ('allenai/wildjailbreak', 'eval'),
      {'split': 'train', 'delimiter': '\t', 'keep_default_na': False},
    )
  ]


def test_errors_list_what_there_is(tmp_path):
  path = str(FILES['xstest'])
  for settings, message in [
    ({'source': 'xtest', 'path': path}, "source='xtest' is not one of hh_red_team, .*ultrachat"),
    ({'source': 'xtest'}, "no such source of prompts.*'xstest'"),
    ({'source': 'hub', 'path': path}, 'is a copy of a published set'),
    ({'source': 'xstest', 'path': path, 'field': 'text'}, r"'text'.*'prompt', 'type', 'label'"),
    ({'source': 'xstest', 'path': path, 'metadata_fields': ('tone',)}, r"'tone'.*'prompt', 'type'"),
    ({'source': 'xstest', 'path': path, 'split': 'test'}, "no split 'test'. It has train"),
    ({'source': 'aya_redteaming', 'split': 'german'}, "no split 'german'. It has english, arabic"),
    ({'source': 'harmbench', 'subset': 'all'}, "no subset 'all'. It has standard, contextual"),
    ({'source': 'xstest', 'subset': 'all'}, "no subset 'all'. It has only one"),
    ({'source': 'xstest', 'name': 'x'}, 'does not support name'),
    (
      {'source': 'aya_redteaming', 'path': path, 'split': 'french'},
      'is a file, so it has no split',
    ),
    (
      {'source': 'xstest', 'path': str(tmp_path / 'x.docx')},
      r"a folder or end in one of .*'.csv'",
    ),
    ({'source': 'xstest', 'path': str(tmp_path / 'x.csv')}, 'there is no such file'),
    ({'source': 'xstest', 'path': str(tmp_path)}, '`datasets` cannot load'),
    (
      {'source': 'xstest', 'path': path, 'where': ('labl=safe',)},
      r"'labl'. There are \['category'",
    ),
    ({'source': 'xstest', 'path': path, 'where': ('label=ok',)}, r"label='ok'.*'safe', 'unsafe'"),
    (
      {'source': 'xstest', 'path': path, 'where': ('label=safe', 'focus=gate')},
      'no prompt matches all of',
    ),
  ]:
    with pytest.raises(UserError, match=message):
      load_prompts(PromptSource(**settings))


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'expand': 'all'}, "expand='all' must be one of"),
    ({'invalid': 'drop'}, "must be 'error' or 'skip'"),
    ({'message_keys': ('speaker',)}, 'must be the names of two keys'),
    ({'roles': ('customer=human',)}, "'customer=human' must be 'NAME=ROLE'"),
    ({'where': ('safe',)}, "'safe' must be 'NAME=VALUE'"),
    ({'source': 'xstest', 'mixture': ('advbench',)}, 'source or mixture, not both'),
    ({'mixture': ('advbench',), 'limit': 0}, 'limit must be at least 1'),
  ],
)
def test_settings_of_another_form_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    PromptSource(**settings)


def test_prompts_are_kept_by_their_metadata():
  safe = load('xstest', where=('label=safe',))
  assert [p.metadata['label'] for p in safe] == ['safe'] * 4
  both = load('xstest', where=('category=homonyms', 'category=definitions', 'label=safe'))
  assert [p.metadata['category'] for p in both] == ['homonyms', 'definitions']
  assert len(load('xstest', where=('label=safe',), limit=3)) == 3


# One prompt for each turn.


def test_every_turn_of_a_dialogue_becomes_a_prompt():
  whole = load('hh_harmless')
  turns = load('hh_harmless', expand='every_turn')
  assert len(whole) == 8 and len(turns) == 12
  assert [p for p in turns if '/turn-' not in p.id] == whole
  first, second = turns[1:3]
  assert second == whole[1] and first.id == f'{second.id}/turn-1'
  assert first.messages == second.messages[:1] and first.metadata == second.metadata
  assert len({p.id for p in turns}) == 12


def test_ids_of_turns_and_rows_that_collide_are_refused(tmp_path):
  turns = ['user', 'assistant', 'user']
  messages = [{'role': role, 'content': f'{role} {i}'} for i, role in enumerate(turns)]
  path = write(
    tmp_path / 'p.jsonl',
    [{'id': 'a', 'messages': messages}, {'id': 'a/turn-1', 'prompt': 'Another.'}],
  )
  assert len(load_prompts(PromptSource(source=path))) == 2
  with pytest.raises(UserError, match="line 2: the id 'a/turn-1' is already used at .*line 1"):
    load_prompts(PromptSource(source=path, expand='every_turn'))


def test_the_published_dialogues_have_5756_turns(data_dir):
  path = data_dir('hh_rlhf') / 'harmless-base-test.jsonl.gz'
  whole = load('hh_harmless', path)
  turns = load('hh_harmless', path, expand='every_turn')
  assert len(whole) == 2312 and len(turns) == 5756
  assert len({prompt.id for prompt in turns}) == 5756
  assert [p.id for p in turns if '/turn-' not in p.id] == [p.id for p in whole]


def test_turns_of_a_held_out_dialogue_are_not_trained_on(tmp_path, capsys):
  opening = 'Would you tell me how the old bridge near the mill was built?'
  dialogue = f'Human: {opening}\n\nAssistant: With oak.\n\nHuman: And the roof?\n\nAssistant: Tin.'
  harmful = write(tmp_path / 'a.jsonl', [{'chosen': dialogue}, {'prompt': 'Who are you?'}])
  # The opening alone, which is a turn of the dialogue.
  held_out = write(tmp_path / 'b.jsonl', [{'prompt': opening}, {'prompt': 'who  are you?'}])
  config = PromptSets(
    harmful=PromptSource(source=harmful, expand='every_turn'),
    helpful=PromptSource(source='xstest', path=str(FILES['xstest'])),
    eval_harmful=PromptSource(source=held_out, limit=1),
    eval_helpful=PromptSource(source='xstest', path=str(FILES['xstest']), limit=3),
  )
  sets, left_out, _ = load_prompt_sets(config, seed=0)
  assert [last(p) for p in sets['harmful']] == ['Who are you?'] and len(sets['helpful']) == 5
  assert left_out == {'harmful': 2, 'helpful': 3}
  assert '3 of 8 prompts are left out' in capsys.readouterr().out
  with pytest.raises(UserError, match='also occur in the training prompts'):
    load_prompt_sets(
      PromptSets(harmful=PromptSource(source=harmful), eval_harmful=PromptSource(source=held_out)),
      seed=0,
    )


def test_a_prompt_of_two_published_sets_stays_in_the_first(tmp_path, capsys):
  harmless, helpful = read(FILES['hh_harmless']), read(FILES['hh_helpful'])
  copy = write(tmp_path / 'p.jsonl', harmless[5:] + helpful)
  config = PromptSets(
    harmful=PromptSource(source='hh_harmless', path=str(FILES['hh_harmless'])),
    helpful=PromptSource(source='hh_helpful', path=copy),
    eval_harmful=PromptSource(source='advbench', path=str(FILES['advbench']), limit=3),
    eval_helpful=PromptSource(mixture=(f'advbench={FILES["advbench"]}',)),
  )
  sets, near, repeats = load_prompt_sets(config, seed=0)
  assert sets['harmful'] == load('hh_harmless') and sets['helpful'] == load('hh_helpful')
  assert {p.id for p in sets['eval_helpful']} == {p.id for p in load('advbench')[3:]}
  assert near == {'harmful': 0, 'helpful': 0} and repeats == {'helpful': 3, 'eval_helpful': 3}
  assert 'prompts.helpful: 3 of 11 prompts are left out' in capsys.readouterr().out
  same = dataclasses.replace(config, helpful=config.harmful)
  with pytest.raises(UserError, match='prompts.helpful: prompts.harmful has all 8 prompts too'):
    load_prompt_sets(same, seed=0)
  mine = PromptSource(source=write(tmp_path / 'mine.jsonl', harmless[:1]))
  with pytest.raises(UserError, match='Remove it from prompts.helpful, or give each an id'):
    load_prompt_sets(dataclasses.replace(config, helpful=mine), seed=0)


def test_a_config_names_sets_and_mixtures(tmp_path):
  config = default.get_config()
  config.prompts.harmful.mixture = (f'harmbench={FILES["harmbench"]}:1',)
  config.prompts.helpful.update(source='hh_helpful', path=str(FILES['hh_helpful']), limit=2)
  config.prompts.eval_harmful.update(source='advbench', path=str(FILES['advbench']), limit=3)
  run = pipeline.build(config, tmp_path / 'run')
  assert {name: len(prompts) for name, prompts in run.prompts.items()} == {
    'harmful': 8, 'helpful': 2, 'eval_harmful': 3, 'eval_helpful': 0,
  }  # fmt: skip
  config.prompts.harmful.mixture = ('harmbench:many',)
  with pytest.raises(UserError, match="prompts.harmful: mixture: the weight of 'harmbench:many'"):
    pipeline.build(config, tmp_path / 'run')


# Sets that no entry describes.


def test_any_rows_are_read_by_a_mapping(tmp_path):
  turns = [('customer', 'Hi'), ('agent', 'Hello'), ('customer', 'Where is my kite?')]
  rows = [
    {
      'talk': [{'speaker': who, 'text': text, 'at': 3} for who, text in turns],
      'rules': 'Be brief.',
      'topic': 'toys',
    }
  ]
  path = write(tmp_path / 'p.jsonl', rows)
  source = PromptSource(
    source=path,
    field='talk',
    message_keys=('speaker', 'text'),
    roles=('customer=user', 'agent=assistant'),
    system_field='rules',
    metadata_fields=('topic',),
  )
  (prompt,) = load_prompts(source)
  assert [m['role'] for m in prompt.messages] == ['system', 'user', 'assistant', 'user']
  assert prompt.messages[0]['content'] == 'Be brief.' and last(prompt) == 'Where is my kite?'
  assert prompt.metadata == {'topic': 'toys'}
  for change, message in [
    ({'message_keys': ('who', 'text')}, r"lacks the keys \['who'\].*'speaker', 'text', 'at'"),
    ({'system_field': 'law'}, "lacks the system field 'law'.*'talk', 'rules', 'topic'"),
    ({'roles': ()}, "the role 'customer'. The allowed roles"),
    ({'field': 'chat'}, r"none of the fields \['chat'\].*'talk', 'rules', 'topic'"),
  ]:
    with pytest.raises(UserError, match=message):
      load_prompts(dataclasses.replace(source, **change))


def test_plain_texts_are_not_searched_for_labels(tmp_path):
  text = 'User: hi\n\nAssistant:'
  source = PromptSource(source=write(tmp_path / 'p.jsonl', [{'prompt': text}]))
  with pytest.raises(UserError, match='looks like a transcript'):
    load_prompts(source)
  assert last(load_prompts(dataclasses.replace(source, plain=True))[0]) == text


def test_rows_that_are_no_prompts_can_be_left_out(tmp_path, capsys):
  path = write(tmp_path / 'p.jsonl', [{'prompt': 'a'}, {'prompt': ' '}, {'x': 1}, {'prompt': 'b'}])
  source = PromptSource(source=path, invalid='skip')
  assert [last(p) for p in load_prompts(source)] == ['a', 'b']
  out = capsys.readouterr().out
  assert '2 of 4 rows are left out' in out and 'line 2: ' in out
  with pytest.raises(UserError, match='line 2'):
    load_prompts(dataclasses.replace(source, invalid='error'))
  only_bad = write(tmp_path / 'q.jsonl', [{'prompt': ' '}])
  with pytest.raises(UserError, match='the source is empty'):
    load_prompts(PromptSource(source=only_bad, invalid='skip'))


def test_a_set_can_be_registered(tmp_path, restored_registries):
  form = RowForm(fields=('ask',), plain=True, metadata={'category': ('area',)}, keep_ids=False)
  register_set('my_questions', PromptSet('My questions', 'benign', form))
  path = write(tmp_path / 'p.jsonl', [{'ask': 'Where is my kite?', 'area': 'toys', 'id': 3}])
  (prompt,) = load('my_questions', path)
  assert prompt.metadata == {'category': 'toys', 'set': 'my_questions'} and prompt.id != '3'
  with pytest.raises(UserError, match='registered twice'):
    register_set('xstest', PromptSet('Another', 'benign', form))


def test_a_plugin_adds_a_set_to_a_run(tmp_path, restored_registries):
  (tmp_path / 'sets.py').write_text(
    'from cai_jax.data.row_form import RowForm\n'
    'from cai_jax.data.sets import PromptSet, register_set\n'
    "form = RowForm(fields=('ask',), plain=True, metadata={'category': ('area',)})\n"
    "register_set('house', PromptSet('Questions about houses', 'benign', form, hub='lab/house'))\n"
  )
  rows = [{'ask': f'Where is room {i}?', 'area': 'house', 'id': f'room-{i}'} for i in range(4)]
  copy = write(tmp_path / 'house.jsonl', rows)
  config = default.get_config()
  config.plugins = (str(tmp_path / 'sets.py'),)
  config.prompts.harmful.update(source='house', path=copy, where=('category=house',), limit=3)
  config.prompts.helpful.mixture = (f'house={copy}:1', f'advbench={FILES["advbench"]}:1')
  run = pipeline.build(config, tmp_path / 'run')
  assert [p.id for p in run.prompts['harmful']] == ['room-0', 'room-1', 'room-2']
  helpful = {p.id for p in run.prompts['helpful'] if p.metadata['set'] == 'house'}
  assert helpful == {'house/room-3'}  # the others are in `harmful`


def test_the_table_of_sets_is_up_to_date():
  text = (ROOT / 'docs' / 'prompts.md').read_text()
  assert update_page(text) == text, 'run `python -m cai_jax.data.set_table docs/prompts.md`'


@pytest.mark.parametrize('name', list(PROMPT_SETS))
def test_every_set_says_what_it_is(name):
  entry = PROMPT_SETS[name]
  assert entry.kind in ('harmful', 'benign', 'both')
  assert entry.title and entry.licence != 'unknown' and entry.size and entry.file and entry.hub
  assert '@' in entry.seen or entry.seen == 'unverified'
