"""What rates a text: likelihoods, judges, reward models and refusal classifiers."""
