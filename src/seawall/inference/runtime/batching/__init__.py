"""Requests of several users in one run of a model, and how far their rows stay strangers to each other."""
