"""Texts to vectors, with a sentence encoder in this process."""
