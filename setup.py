"""Installs cai_jax: `pip install -e .`; extras: `test`, `wandb`, `cuda` or `tpu` (accelerators)."""

from setuptools import find_packages, setup

setup(
  name='cai_jax',
  version='0.1.0',
  description="Constitutional AI's supervised phase in JAX and Flax",
  python_requires='>=3.11',
  packages=find_packages(include=['cai_jax', 'cai_jax.*']),
  package_data={
    'cai_jax': ['*.yaml', 'tiny/*.yaml', 'tiny/model/*', 'tiny/model_small/*', 'report/*.html']
  },
  install_requires=[
    'jax>=0.10.2',
    'flax>=0.12.8',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8',
    'grain>=0.2.18',
    'array_record>=0.8.3',
    'tensorflow-datasets>=4.9.10',
    'importlib_resources',  # tensorflow-datasets imports it without declaring it
    'ml-collections>=1.1.0',
    'transformers>=5.0',
    'tokenizers',
    'huggingface_hub',
    'absl-py',
    'datasets',
    'jinja2',
    'safetensors>=0.6',
    'ml_dtypes',
    'numpy',
    'pyyaml',
    'tensorboardX',
    'tqdm',
    'urllib3>=2',
  ],
  extras_require={
    'test': ['pytest', 'ruff', 'selenium', 'torch==2.13.0'],
    'cuda': ['jax[cuda13]>=0.10.2'],
    'tpu': ['jax[tpu]>=0.10.2'],
    'wandb': ['wandb'],
  },
)
