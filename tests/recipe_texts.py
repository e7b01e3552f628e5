"""Recipes of every shape, as they are written for mergekit, each with the dtype its result is rounded in."""

from __future__ import annotations

import torch

RECIPES: dict[str, tuple[str, torch.dtype]] = {
    # models, a filter and values over the layers, a value as text
    "slerp over depth": (
        """
merge_method: slerp
base_model: {root}/llama/base
slices:
  - sources:
      - {{model: {root}/llama/base, layer_range: [0, 4]}}
      - {{model: {root}/llama/a, layer_range: [0, 4]}}
parameters:
  t:
    - {{filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}}
    - {{filter: mlp, value: [1, 0.5, "7e-1", 0.3, 0]}}
    - value: 0.5
dtype: bfloat16
""",
        torch.bfloat16,
    ),
    # layers stacked, with scales
    "frankenmerge": (
        """
merge_method: passthrough
slices:
  - sources: [{{model: {root}/llama/a, layer_range: [0, 3]}}]
  - sources:
      - model: {root}/llama/b
        layer_range: [1, 4]
        parameters:
          scale:
            - {{filter: o_proj, value: 0.0}}
            - {{filter: down_proj, value: 0.5}}
            - value: 1.0
dtype: float32
""",
        torch.float32,
    ),
    # parameters at every level, layers of different models shifted against each other
    "ties over shifted slices": (
        """
merge_method: ties
base_model: {root}/llama/base
parameters:
  normalize: true
  int8_mask: true
  weight: [0.2, 1.0]
  density:
    - {{filter: mlp, value: [0.9, 0.5, 0.3]}}
    - value: 0.7
slices:
  - sources:
      - {{model: {root}/llama/base, layer_range: [0, 2]}}
      - {{model: {root}/llama/a, layer_range: [0, 2], parameters: {{density: 0.4}}}}
      - {{model: {root}/llama/b, layer_range: [0, 2]}}
  - parameters: {{lambda: [0.5, 0.9]}}
    sources:
      - {{model: {root}/llama/base, layer_range: [1, 4]}}
      - model: {root}/llama/b
        layer_range: [0, 3]
        parameters: {{weight: [{{filter: layers.1., value: 0.1}}]}}
      - {{model: {root}/llama/c, layer_range: [1, 4]}}
""",
        torch.float32,
    ),
    # a module named, a method without a base, storage in another dtype than that of computing
    "gpt2 by module": (
        """
merge_method: nuslerp
modules:
  default:
    parameters: {{nuslerp_flatten: false}}
    slices:
      - sources:
          - {{model: {root}/gpt2/a, layer_range: [0, 2], parameters: {{weight: [0.3, 0.8]}}}}
          - {{model: {root}/gpt2/b, layer_range: [1, 3], parameters: {{weight: 1}}}}
      - sources:
          - {{model: {root}/gpt2/b, layer_range: [0, 2]}}
          - {{model: {root}/gpt2/c, layer_range: [0, 2]}}
parameters: {{weight: 0.5}}
dtype: float32
out_dtype: bfloat16
""",
        torch.bfloat16,
    ),
    # filters on names of a classifier
    "bert in fp16": (
        """
merge_method: linear
models:
  - model: {root}/bert/a
    parameters:
      weight:
        - {{filter: attention, value: [0.9, 0.1]}}
        - {{filter: classifier, value: 0}}
        - value: 0.4
  - model: {root}/bert/b
    parameters: {{weight: [0.1, 0.2, 0.3]}}
dtype: float16
""",
        torch.float16,
    ),
    # a base among the models, breadcrumbs with an election
    "gpt2 breadcrumbs": (
        """
merge_method: breadcrumbs_ties
base_model: {root}/gpt2/base
models:
  - model: {root}/gpt2/base
  - {{model: {root}/gpt2/a, parameters: {{weight: 0.6, density: 0.5, gamma: 0.1}}}}
  - {{model: {root}/gpt2/c, parameters: {{weight: [0.2, -0.5], density: [0.9, 0.6]}}}}
parameters: {{lambda: 0.8, normalize: true}}
""",
        torch.float32,
    ),
    # a base of its own for a slice; a module's value beats the recipe's, a slice's the module's
    "bert with two bases": (
        """
merge_method: slerp
base_model: {root}/bert/base
modules:
  default:
    parameters: {{t: 0.3}}
    slices:
      - sources:
          - {{model: {root}/bert/base, layer_range: [0, 1]}}
          - {{model: {root}/bert/a, layer_range: [0, 1]}}
      - base_model: {root}/bert/b
        sources:
          - {{model: {root}/bert/a, layer_range: [1, 3]}}
          - {{model: {root}/bert/b, layer_range: [1, 3]}}
        parameters: {{t: [0.6, 0.9]}}
parameters: {{t: 0.1}}
""",
        torch.float32,
    ),
    # nothing is drawn at density 1
    "bert dare": (
        """
merge_method: dare_ties
base_model: {root}/bert/base
models:
  - {{model: {root}/bert/a, parameters: {{weight: 0.5, density: 1.0}}}}
  - {{model: {root}/bert/b, parameters: {{weight: 0.3, density: [1, 1]}}}}
""",
        torch.float32,
    ),
}
