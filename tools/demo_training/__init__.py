"""Parts of ``tools/train_demo.py``: the corpus, the references, the model and its training.

Nothing here imports the package: torch, numpy, safetensors and tokenizers are enough, so the
training runs on any GPU machine that has those four.
"""
