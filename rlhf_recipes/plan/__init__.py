"""Predicts the peak memory of each stage from its config, by part, without weights, data or a GPU.

    make plan ARGS="model=qwen2.5-0.5b data=ultrafeedback hardware=12gb" CARD=12

No formula stands behind it. The real modules run the real passes of a stage on tensors that have a shape and no data,
in a model of few layers, and the figures are drawn out to the model's depth. `benchmarks.plan` holds predicted against
measured. `command` alone does not import torch.
"""
