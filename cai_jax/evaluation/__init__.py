"""What a model is worth: scores of responses, likelihoods, multiple choice, a judge."""
