"""The models: backbone and classifier, their variants, and the reading of weights."""
