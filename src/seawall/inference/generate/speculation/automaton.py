"""A suffix automaton: the longest end of a text that stood in it before, after every token, at constant cost."""

from __future__ import annotations

_LINKS = 4  # shorter suffixes whose latest place is kept up to date; all of them would cost the square of the length


class SuffixAutomaton:
    """Every substring of a growing text (Blumer et al., 1985), and where its current end was seen last.

    At most two states a token, each a dict of a few transitions: about 0.6 KB and 2 us a token.

    Attributes:
        text: the tokens so far.
        matched: length of the longest suffix of the text that also ends earlier in it.
        source: index after that earlier place, where what followed then stands.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.matched = 0
        self.source = 0
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._after = [0]  # where each state's strings were seen to end, latest first known
        self._last = 0
        self._state = 0

    def append(self, token: int) -> None:
        """Grow the text by a token."""
        self._match(token)
        self._insert(token)
        # A state that was split keeps its longer strings: the match may belong to the other half.
        while self.matched and self.matched <= self._length[self._link[self._state]]:
            self._state = self._link[self._state]
        self.source = self._after[self._state]
        state = self._state
        for _ in range(_LINKS):
            if state <= 0:
                break
            self._after[state] = len(self.text)
            state = self._link[state]

    def following(self, count: int) -> list[int]:
        """At most `count` tokens that followed the earlier place; they may run on into themselves."""
        if not self.matched:
            return []
        found = self.text[self.source : self.source + count]
        period = len(self.text) - self.source
        while len(found) < count:
            found.append(found[-period])
        return found

    def _match(self, token: int) -> None:
        state = self._state
        while state and token not in self._next[state]:
            state = self._link[state]
            self.matched = self._length[state]
        if token in self._next[state]:
            state = self._next[state][token]
            self.matched += 1
        self._state = state

    def _insert(self, token: int) -> None:
        self.text.append(token)
        new = self._new_state({}, 0, self._length[self._last] + 1, len(self.text))
        state = self._last
        while state >= 0 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state >= 0:
            old = self._next[state][token]
            if self._length[old] != self._length[state] + 1:
                old = self._split(state, token, old)
            self._link[new] = old
        self._last = new

    def _split(self, state: int, token: int, old: int) -> int:
        half = self._new_state(dict(self._next[old]), self._link[old], self._length[state] + 1, self._after[old])
        while state >= 0 and self._next[state].get(token) == old:
            self._next[state][token] = half
            state = self._link[state]
        self._link[old] = half
        return half

    def _new_state(self, following: dict[int, int], link: int, length: int, after: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._after.append(after)
        return len(self._link) - 1
