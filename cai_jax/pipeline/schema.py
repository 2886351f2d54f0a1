"""Every field of a run, once, with its unit and meaning. Other configs state only what differs.

A folder, file or hub name may be given wherever a path is asked for. The embedded world goes by the
name 'tiny' as a model (a lesser one is 'tiny-small'), a constitution, a source of prompts and a
scorer.
"""

from ml_collections import ConfigDict


def default_config() -> ConfigDict:
  """The default config."""
  config = ConfigDict()
  config.seed = 0  # of principles, sampling, and the order of training examples

  config.model = ConfigDict()
  config.model.base = 'tiny'  # M_θ
  config.model.critique = ''  # M_critique; '' is M_θ
  config.model.revision = ''  # M_revise; '' is M_θ
  config.model.init = ''  # what M_aligned starts from; '' is M_θ
  config.model.dtype = 'float32'  # of sampling: parameters, cache and arithmetic

  config.remote = ConfigDict()  # models that are served elsewhere, each instead of model's
  config.remote.base = remote()  # M_θ: set model.base='', and model.init for the aligned model
  config.remote.critique = remote()
  config.remote.revision = remote()

  config.mesh = ConfigDict()  # devices along each axis; -1 is the rest
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1

  config.constitution = ConfigDict()
  config.constitution.path = 'general'  # 'general', 'tiny', a YAML or published JSON file, a folder
  config.constitution.tags = ()  # keep principles with any of these; () keeps all
  config.constitution.ids = ()  # keep principles with these ids; () keeps all

  config.prompts = ConfigDict()
  config.prompts.harmful = prompts()  # answered, criticised and revised
  config.prompts.helpful = prompts()  # answered only, for train.helpfulness_share
  config.prompts.eval_harmful = prompts()  # held out; they may not occur in the two above
  config.prompts.eval_helpful = prompts()

  config.feedback = ConfigDict()
  config.feedback.rounds = 4  # critiques and revisions of each response
  # 'critique'; 'direct': revise without one; controls: 'empty' critiques, 'shuffled': of others
  config.feedback.variant = 'critique'
  config.feedback.context = 'fresh'  # a round sees the latest response; 'growing': all before
  config.feedback.repeat_principles = True  # each round's principle is drawn independently
  config.feedback.demonstrations = True  # the constitution's few-shot dialogues stand in front
  config.feedback.style = 'chat'  # the tokenizer's chat template, or 'plain' Human:/Assistant:
  config.feedback.template_options = ()  # for that template, such as (('enable_thinking', False),)
  config.feedback.shard_rows = 256  # rows in a file of D_CAI
  config.feedback.helpful_samples = 1  # responses to each helpful prompt
  config.feedback.max_rate = max_rate()  # of defects; above one the generate stage fails

  config.sampling = ConfigDict()
  config.sampling.initial = sampling()
  config.sampling.critique = sampling()
  config.sampling.revision = sampling()

  config.engine = ConfigDict()
  config.engine.slots = 64  # chains in flight, at most
  config.engine.cache_gib = 8.0  # for caches, on each device; fewer slots where it is too little
  config.engine.prefill_tokens = 128  # of all slots, prefilled together
  config.engine.prefill_width = 16  # of them, tokens of a slot that attention takes together
  config.engine.spans = 4  # of a cache; a step reads those that some row has come to
  config.engine.longest_burst = 32  # decode steps before the host looks
  config.engine.spare_tokens = 0  # of a slot's cache, for replies longer in another tokenizer

  config.train = ConfigDict()
  config.train.target = 'last'  # learn the 'last' revision, 'all' of them, or y_init ('initial')
  config.train.helpfulness_share = 0.0  # of the examples: y_init of helpful prompts
  config.train.drop_truncated = True  # leave out targets that were cut at max_tokens
  config.train.filters = ()  # and those with any of these defects, names as in max_rate
  config.train.loss = 'nll'  # negative log-likelihood of the targets, or a registered loss
  config.train.loss_normalization = 'sequence'  # mean over sequences; 'token': over tokens
  config.train.epochs = 1  # times every example is seen
  config.train.batch_size = 32  # packed rows a step
  config.train.accumulation = 1  # micro-batches a step is computed in
  config.train.max_length = 1024  # tokens of a packed row; a longer example is dropped
  config.train.learning_rate = 1e-5  # peak
  config.train.schedule = 'cosine'  # after the warm-up: 'constant', 'linear', 'cosine', 'wsd'
  config.train.warmup = 0.05  # share of the steps
  config.train.decay = 0.1  # share of the steps, the last, in which 'wsd' falls
  config.train.final_share = 0.0  # of the peak, at the end of 'linear', 'cosine' and 'wsd'
  config.train.weight_decay = 0.0  # not of norms and biases
  config.train.b1 = 0.9
  config.train.b2 = 0.95
  config.train.eps = 1e-8
  config.train.clip_norm = 1.0  # largest global gradient norm; 0 never clips
  config.train.ema = 0.0  # decay of an average of the parameters, then the result; 0 is none
  config.train.lora_rank = 0  # of low-rank adapters, trained instead of all; 0 is none
  config.train.lora_alpha = 16.0  # they count alpha / rank
  config.train.lora_modules = 'attention/|mlp/'  # regular expression: which linear layers
  config.train.remat = 'none'  # 'dots', 'full': compute more again backward, for less memory
  config.train.attention = 'blocks'  # 'xla'; 'splash' on TPUs, 'cudnn' on NVIDIA GPUs
  config.train.dtype = 'float32'  # of arithmetic; parameters and optimizer state are f32
  config.train.eval_share = 0.0  # of the examples, held out
  config.train.eval_every = 0  # steps between losses on these; 0 is the end only
  config.train.patience = 0  # evaluations without a lower such loss, then stop; 0 never stops
  config.train.probes = 0  # held-out prompts answered at each evaluation
  config.train.log_every = 1  # steps
  config.train.checkpoint_every = 100  # steps; 0 is the end only
  config.train.keep = 2  # checkpoints
  config.train.wandb = ''  # project of Weights & Biases that gets the metrics too; '' is none

  config.evaluation = ConfigDict()
  config.evaluation.scorer = 'none'  # 'tiny': the embedded world's oracle; 'none': lengths only
  config.evaluation.refusal = 'none'  # 'rules', or a classifier's checkpoint: which answers refuse
  config.evaluation.refusal_label = ''  # of that checkpoint, where it has several
  config.evaluation.reward_model = ''  # sequence-classification checkpoint that scores responses
  config.evaluation.reward_label = ''  # of that checkpoint, where it has several
  config.evaluation.style = 'chat'  # those two are given conversations in; or 'plain'
  config.evaluation.multiple_choice = ()  # files of {prompt, corrects, incorrects} a line
  config.evaluation.swap = False  # ask those with their two options exchanged, too
  config.evaluation.judge = ''  # model that compares M_aligned's answers with M_θ's; 'base' is M_θ
  config.evaluation.judge_principles = (
    'Choose the answer that harms nobody and still helps with what was asked.',
  )  # each prompt is judged under one of them, drawn by the seed
  config.evaluation.loss = True  # nats of held-out prompts' last revisions

  config.report = ConfigDict()
  config.report.chains = 500  # shown in the report's browser
  config.report.published = ''  # a *_SLMADISON.jsonl file; its defects stand beside ours
  return config


def max_rate() -> ConfigDict:
  """The largest share of the revisions that may have a defect; 1 sets no limit."""
  config = ConfigDict()
  config.empty = 1.0  # nothing but white space
  config.truncated = 1.0  # cut at max_tokens
  config.identical = 1.0  # the response before it
  config.near_identical = 1.0  # nearly that: 0.95 alike by words
  config.preamble = 1.0  # 'Here is the revised response:'
  config.role_marker = 1.0  # 'Human:', '<|user|>'
  config.principle_leak = 1.0  # 8 words in a row of what was asked for
  config.no_finding = 1.0  # its critique finds nothing wrong
  config.repetition = 1.0  # a loop of words or characters
  config.demonstration = 1.0  # a copy of a few-shot demonstration's reply
  return config


def remote() -> ConfigDict:
  """A model behind an OpenAI-compatible completions API; '' as the url is none at all."""
  config = ConfigDict()
  config.url = ''  # base of the API, such as 'http://localhost:8000/v1'
  config.model = ''  # the name it is served under
  config.tokenizer = ''  # folder or hub name of its tokenizer
  config.server = 'openai'  # 'vllm', 'sglang', 'tgi', 'llama.cpp'; 'openai' sends no extension
  config.revision = ''  # of the served weights; a change of it is another model to the journal
  config.max_positions = 4096  # tokens of a context with its reply
  config.prompt = 'tokens'  # contexts are sent as 'tokens' or 'text'
  config.timeout_seconds = 300.0  # without a byte from the server
  config.retries = 8  # further tries of a request
  config.backoff_seconds = 1.0  # before the first of them; doubles
  config.max_concurrent = 64  # requests on their way, in each process
  config.api_key_env = ''  # NAME of the environment variable with the API key; '' sends none
  return config


def prompts() -> ConfigDict:
  """Where prompts come from; '' as the source is none at all."""
  config = ConfigDict()
  config.source = ''  # a .jsonl or .txt file, 'tfds', 'hub', or 'tiny'
  config.name = ''  # of the TFDS or hub dataset; in 'tiny': 'baited' or 'benign'
  config.subset = ''  # of the hub dataset, where it has several
  config.split = 'train'  # of the dataset; in 'tiny': 'train' or 'eval'
  config.field = ''  # that holds the prompt; '' is the first of messages, prompt, chosen
  config.limit = -1  # rows; -1 is all
  config.shuffle = False  # by the seed, before the limit
  config.metadata_fields = ()  # further fields of a row that are kept with it
  return config


def sampling() -> ConfigDict:
  """How one kind of turn is sampled."""
  config = ConfigDict()
  config.temperature = 1.0  # 0 is greedy
  config.top_k = 0  # tokens kept; 0 is all
  config.top_p = 1.0  # mass kept
  config.max_tokens = 256  # longest reply in tokens
  config.stop = ()  # further texts that end a reply
  config.stop_token_ids = ()  # further tokens that end it
  return config
