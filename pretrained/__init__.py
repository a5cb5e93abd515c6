"""Sets of weights that ship with the package: one folder each, with `config.json` and `model.safetensors`. No code."""
