"""Adapters of stacked expert weights: places, routes by expert, grouped products."""
