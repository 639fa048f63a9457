"""A model of random weights that can spell any text: what it says is nonsense, so a constraint does the work."""

import numpy as np

from seawall.inference import Vocabulary
from seawall.inference.generate.speculation import Proposal, Speculation
from seawall.inference.models.tokenizer import _byte_alphabet

LETTER = {byte: letter for letter, byte in _byte_alphabet().items()}
PAIRS = ['{"', '":', '",', "12", "ab", "an", "tr", "ue", "00", "}}", '"}']
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = SPECIALS + [LETTER[byte] for byte in range(256)] + PAIRS
EXACT = Speculation(drafters=())
ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "maxLength": 6},
        "number": {"type": "integer", "minimum": 0, "maximum": 999},
        "country": {"enum": ["Germany", "France", "Côte d'Ivoire"]},
    },
    "required": ["street", "number", "country"],
    "additionalProperties": False,
}


class Guessing:
    """Drafts at random, so mostly what the constraint forbids."""

    name = "guessing"
    chances = (0.1,)

    def cost(self):
        return 0.0

    def start(self, prompt, host):
        self.rng = np.random.default_rng(0)
        return self

    def propose(self, turn):
        for _ in range(turn.most):
            yield Proposal(int(self.rng.integers(len(TOKENS))))

    def extend(self, token):
        pass

    def close(self):
        pass


def answer(decoder, constraint, speculation=EXACT, prompt=(5, 6, 7), tokens=400, **settings):
    with decoder.start(
        prompt, max_tokens=tokens, constraint=constraint, speculation=speculation, **settings
    ) as sequence:
        steps = list(sequence)
    return "".join(step.text for step in steps), steps[-1].finish, sequence.tokens


def words(*texts):
    """A vocabulary of a few texts and one end token."""
    tokens = [b"", *(text.encode() for text in texts)]

    def encode(text):
        return [texts.index(letter) + 1 for letter in text]

    return Vocabulary(size=len(tokens), ends=frozenset({0}), bytes_of=tokens.__getitem__, encode=encode)
