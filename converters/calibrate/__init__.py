"""Predictors and an order for neurons, from what a model does with text."""
