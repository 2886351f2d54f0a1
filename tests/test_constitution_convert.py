"""Published lists of principles: their exact forms, and the constitutions that they become."""

import json

import pytest

from cai_jax.constitution import ConstitutionConfig, convert, load_constitution
from cai_jax.runtime.errors import UserError

# As text is copied from a PDF: bullets, wrapped lines, a heading after a rule.
CHOICES = """The Rules of Our Town

• Choose the response that is the most patient with people who ask the same
thing twice.
• Choose the response that is least proud of itself. Second part

Not a rule.
Please choose the assistant response that says "I do not know."
"""
# The columns of clean_comments.csv in saffronh/ccai (commit 3ff5dce), and rows of our own.
COLUMNS = (
  'comment-id,timestamp,datetime,author-id,agrees,disagrees,passes,moderated,comment-body,'
  'group_0_consensus,group_1_consensus\n'
)
ROWS = """\
0,1688761206986,Fri Jul 07 13:20:06 PDT 2023,0,90,5,5,1,"AI should be patient, and kind.",0.95,0.85
7,1688761206987,Fri Jul 07 13:20:07 PDT 2023,3,90,5,5,1,AI should sing,0.2,0.9
8,1688761206988,Fri Jul 07 13:20:08 PDT 2023,3,90,5,5,0,AI is not moderated in,0.9,0.9
9,1688761206989,Fri Jul 07 13:20:09 PDT 2023,3,90,5,5,1,"AI should be patient, and kind.",0.9,0.9
"""
STATEMENTS = COLUMNS + ROWS


def write(tmp_path, text, form, *flags):
  source, target = tmp_path / 'source', tmp_path / 'converted.yaml'
  source.write_text(text, encoding='utf-8')
  convert.main([f'--form={form}', f'--input={source}', f'--output={target}', *flags])
  return load_constitution(ConstitutionConfig(str(target))), target


def test_rules_for_choosing_become_principles(tmp_path, capsys):
  loaded, target = write(tmp_path, CHOICES, 'choose')
  rules = [
    'Choose the response that is the most patient with people who ask the same thing twice.',
    'Choose the response that is least proud of itself.',
    'Please choose the assistant response that says "I do not know."',
  ]
  assert [p.id for p in loaded.principles] == ['rule_1', 'rule_2', 'rule_3']
  for principle, rule in zip(loaded.principles, rules, strict=True):
    assert f'"{rule}"' in principle.critique_request and f'"{rule}"' in principle.revision_request
    assert principle.comparison_request == principle.comparison == rule
  assert 'Second part' not in target.read_text() and 'Not a rule' not in target.read_text()
  assert target.read_text().startswith('# Converted from source (SHA-256 ')
  assert '3 principles' in capsys.readouterr().out


def test_each_text_of_a_json_list_is_a_rule(tmp_path):
  texts = [
    '\nWhich response is kinder? Choose the kinder one. Options:',
    'Choose {the} shorter one',
  ]
  loaded, _ = write(tmp_path, json.dumps(texts), 'choose')
  quoted = [p.revision_request.partition(': ')[2] for p in loaded.principles]
  assert quoted == [
    '"Which response is kinder? Choose the kinder one."',
    '"Choose {the} shorter one"',
  ]


def test_statements_on_which_both_groups_agree_become_principles(tmp_path):
  loaded, _ = write(tmp_path, STATEMENTS, 'statements')
  (principle,) = loaded.principles  # moderated, agreed, and equal ones once
  assert principle.id == 'statement_0'
  assert '"AI should be patient, and kind."' in principle.critique_request
  assert '"AI should be patient, and kind." Choose' in principle.comparison_request
  loaded, _ = write(tmp_path, STATEMENTS, 'statements', '--consensus=0.2')
  assert [p.id for p in loaded.principles] == ['statement_0', 'statement_7']


@pytest.mark.parametrize(
  ('text', 'form', 'message'),
  [
    ('Be kind.', 'choose', 'no rule that begins with'),
    ('["a"', 'choose', 'begins like a JSON list and is none'),
    ('[1]', 'choose', 'non-blank texts only'),
    ('comment-id,comment-body\n1,a\n', 'statements', r"no columns \['moderated'"),
    (STATEMENTS.replace('0.95,0.85', 'x,0.85'), 'statements', 'row 2 has no shares'),
    (STATEMENTS.replace('0.9,0.9', '0,0').replace('0.95,0.85', ','), 'statements', 'Lower it'),
  ],
)
def test_other_files_are_refused_and_nothing_is_written(tmp_path, text, form, message):
  with pytest.raises(UserError, match=message):
    convert.convert(text, form)
  with pytest.raises(SystemExit, match='source: '):
    write(tmp_path, text, form)
  assert not (tmp_path / 'converted.yaml').exists()


def test_the_published_principles_for_reinforcement_learning_are_converted(tmp_path, data_dir):
  text = (data_dir('cai_paper') / 'prompts' / 'RLMadisonInstructions.json').read_text()
  loaded, _ = write(tmp_path, text, 'choose')
  assert len(loaded.principles) == 16
  assert not any('Options' in p.critique_request for p in loaded.principles)
  path = data_dir('cai_paper') / 'prompts' / 'RLMadisonInstructions.json'
  assert load_constitution(ConstitutionConfig(str(path))).principles == loaded.principles


def test_the_constitutions_of_the_package_ask_about_two_responses():
  for name in ('general', 'everyday'):
    principles = load_constitution(ConstitutionConfig(name)).principles
    requests = {p.comparison_request for p in principles}
    assert '' not in requests and len(requests) == len(principles)
    assert all('hoose the response' in request for request in requests)


def test_the_everyday_constitution_is_complete():
  loaded = load_constitution(ConstitutionConfig('everyday'))
  assert 10 <= len(loaded.principles) <= 20
  tags = {tag for principle in loaded.principles for tag in principle.tags}
  assert tags == {'help', 'honesty', 'respect', 'safety'}
  requests = {p.critique_request: p.revision_request for p in loaded.principles}
  for dialogue in loaded.demonstrations:  # they demonstrate principles of the file
    texts = {message['role']: message['content'] for message in dialogue}
    assert requests[texts['critique_request']] == texts['revision_request']
