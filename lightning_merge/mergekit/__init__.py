"""Recipes of mergekit, run unchanged: read, checked from headers, and planned as merges of ours."""

from lightning_merge.mergekit.plan import RecipePlan, read_recipe

__all__ = ["RecipePlan", "read_recipe"]
