"""Chat messages to the text that a model was trained on, by the template its file carries."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from seawall.inference.errors import EmptyPromptError, InvalidPromptError

from .template import compiled
from .tokenizer import TextCodec

Message = Mapping[str, str]
_ROLES = ("system", "user", "assistant")


class ChatTemplate:
    """A model's chat template, compiled once."""

    def __init__(self, source: str, codec: TextCodec) -> None:
        self._render = compiled(source, {"raise_exception": _refuse})
        self._codec = codec
        names = sorted(codec.specials, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names))) if names else None

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the messages; only the template writes control tokens.

        A message that spells one out, to end its own turn and speak as somebody else, has it encoded as
        the letters it consists of.
        """
        if self._control is None or not any(self._control.search(one["content"]) for one in messages):
            return self._codec.encode(self.render(messages))
        text = "".join(one["content"] for one in messages)
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
        spelled: list[str] = []

        def hide(found: re.Match[str]) -> str:
            spelled.append(found.group())
            return mark

        hidden = [{**one, "content": self._control.sub(hide, one["content"])} for one in messages]
        pieces = self.render(hidden).split(mark)
        tokens = self._codec.encode(pieces[0])
        for literal, piece in zip(spelled, pieces[1:], strict=True):
            tokens += self._codec.encode_verbatim(literal) + self._codec.encode(piece)
        return tokens

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text, ending where the assistant's answer begins."""
        try:
            return self._render({"messages": [dict(one) for one in messages], "add_generation_prompt": True})
        except InvalidPromptError:
            raise
        except Exception as error:  # a template can raise anything
            raise InvalidPromptError(f"the model's chat template refuses these messages: {error}") from error


def checked_messages(prompt: str | Sequence[Message]) -> list[dict[str, str]]:
    """The messages of a prompt, where a string is one message of the user.

    ```python
    from seawall.inference.models.chat import checked_messages

    print(checked_messages("Hello"))
    #> [{'role': 'user', 'content': 'Hello'}]
    ```
    """
    messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            shown = repr(message)[:80]
            raise InvalidPromptError(f"a message needs a 'role' and a 'content' of type str, got {shown}")
        if message.get("role") not in _ROLES:
            raise InvalidPromptError(f"unknown role {message.get('role')!r}: use one of {', '.join(_ROLES)}")
    if not messages or not messages[-1]["content"].strip():
        raise EmptyPromptError
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _refuse(reason: object) -> NoReturn:
    raise InvalidPromptError(f"the model's chat template refuses these messages: {reason}")
