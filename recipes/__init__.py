"""The stages, one short script each; run one as `python -m recipes.<stage> key=value ...` or by its make target."""
