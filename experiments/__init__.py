"""Recipes: each file returns one frozen config."""
