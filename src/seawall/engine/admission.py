"""Who gets the next free row, and who is told at once that it is no use to wait. Pure: told the time.

Rules, strongest first: priority, where waiting counts; fairness between tenants, by tokens (start-time fair queueing,
Goyal et al. 1996); earliest deadline first. The queue is bounded by requests and by tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from seawall.core import checks
from seawall.engine.errors import AdmissionError, DeadlineUnmeetableError, QueueFullError, QueueTimeoutError
from seawall.engine.pace import Pace

_PATIENCE = 60.0  # seconds: who names no deadline is served before deadlines that come later than this
_MOST_TENANTS = 1024  # that are remembered while they have nothing here


@dataclass(eq=False, slots=True)
class Ticket:
    """One answer that wants a row, and then has it.

    Attributes:
        prompt: tokens to read.
        answer: tokens to write, at most.
        priority: a level, higher first.
        tenant: whose it is.
        deadline: when it is of no use any more, on the clock that `Admission` is told.
        arrived: when it came.
        written: tokens of the answer so far.
        charged: tokens that its tenant paid for it when it got its row.
    """

    prompt: int
    answer: int
    priority: int = 2
    tenant: str = ""
    deadline: float = math.inf
    arrived: float = 0.0
    written: int = 0
    charged: float = 0.0

    @property
    def tokens(self) -> int:
        """Tokens that it takes at most."""
        return self.prompt + self.answer


class _Tenant:
    """What waits for one tenant, and what it had so far."""

    __slots__ = ("running", "served_at", "virtual", "waiting")

    def __init__(self, virtual: float) -> None:
        self.virtual = virtual  # tokens it had, counted from where it came in
        self.served_at = -math.inf
        self.running = 0
        self.waiting: dict[Ticket, None] = {}

    @property
    def level(self) -> int:
        """Of the most important that waits."""
        return max(ticket.priority for ticket in self.waiting)

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return sum(ticket.tokens for ticket in self.waiting)


class Admission:
    """The queue before the engine's rows.

    Who waits is served by priority, each `aging` seconds of waiting being worth one level; of tenants that are equal
    in that, the one that had fewest tokens; of its answers, the one whose deadline is first. Nobody starves: a low
    priority rises to the highest that waits, and there who had least goes first. A large answer that has its turn
    keeps it until there is room for it.

    Args:
        name: of the engine, for errors.
        rows: answers at once.
        max_queued: answers that may wait beyond free rows.
        max_queued_tokens: tokens, prompt and longest answer together, that may wait; one answer always may.
        max_wait: seconds that one may wait.
        aging: seconds of waiting that are worth one level of priority; `math.inf` for none.
        pace: how fast the engine is; None never refuses because of a deadline that is still to come.
    """

    def __init__(
        self,
        name: str,
        *,
        rows: int,
        max_queued: int = 64,
        max_queued_tokens: int = 65_536,
        max_wait: float = 30.0,
        aging: float = 5.0,
        pace: Pace | None = None,
    ) -> None:
        self.name = name
        self.rows = checks.count("rows", rows)
        self.max_queued = checks.count("max_queued", max_queued, least=0)
        self.max_queued_tokens = checks.count("max_queued_tokens", max_queued_tokens)
        self.max_wait = checks.seconds("max_wait", max_wait, infinite=True)
        self.aging = checks.seconds("aging", aging, infinite=True)
        self.pace = pace or Pace()
        self.running: dict[Ticket, None] = {}
        self._tenants: dict[str, _Tenant] = {}
        self._floor = 0.0  # virtual time of whoever comes in anew

    @property
    def waiting(self) -> int:
        """Answers that wait."""
        return sum(len(tenant.waiting) for tenant in self._tenants.values())

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait."""
        return sum(tenant.tokens for tenant in self._tenants.values())

    def offer(self, tickets: Sequence[Ticket], now: float) -> list[Ticket]:
        """Queue all of them, or none; returns those that had to give way, which are out of the queue then.

        Raises:
            QueueFullError: there is no room, and none whose turn would be later is of less importance; or its turn
                would not come within `max_wait`.
            DeadlineUnmeetableError: their deadline is over, or can't be met.
        """
        first = tickets[0]
        self._check_times(first, now)
        victims: list[Ticket] = []
        while not self._have_room(tickets, victims):
            victim = self._victim(first, victims, now)
            if victim is None:
                raise self.full()
            victims.append(victim)
        for victim in victims:
            self._leave(victim)
        tenant = self._tenants.get(first.tenant)
        if tenant is None:
            tenant = self._tenants[first.tenant] = _Tenant(self._floor)
        elif not tenant.waiting and not tenant.running:
            tenant.virtual = max(tenant.virtual, self._floor)
        for ticket in tickets:
            ticket.arrived = now
            tenant.waiting[ticket] = None
        return victims

    def next(self, now: float) -> Ticket | None:
        """Whose turn it is, once a row and memory are free; it stays in the queue until `admit`."""
        backlogged = [tenant for tenant in self._tenants.values() if tenant.waiting]
        if not backlogged or len(self.running) >= self.rows:
            return None
        top = max(tenant.level for tenant in backlogged)

        def claim(tenant: _Tenant) -> tuple[float, float, float]:
            oldest = min(ticket.arrived for ticket in tenant.waiting)
            lifted = tenant.level + (now - max(oldest, tenant.served_at)) // self.aging
            return -min(top, lifted), tenant.virtual, oldest

        tenant = min(backlogged, key=claim)
        top = tenant.level
        return min(
            tenant.waiting,
            key=lambda ticket: (-min(top, self._level(ticket, now)), self._due(ticket), ticket.arrived),
        )

    def admit(self, ticket: Ticket, now: float) -> None:
        """It has its row."""
        self._leave(ticket)
        tenant = self._tenants[ticket.tenant]
        backlogged = [one.virtual for one in self._tenants.values() if one.waiting]
        self._floor = max(self._floor, min([tenant.virtual, *backlogged]))
        ticket.charged = ticket.prompt + self.pace.expected(ticket.answer)
        tenant.virtual += ticket.charged
        tenant.served_at = now
        tenant.running += 1
        self.running[ticket] = None

    def put_back(self, ticket: Ticket) -> None:
        """It lost its row before anything was told of it, and waits again, with its old place."""
        self._end(ticket, 0)
        ticket.written = 0
        self._tenants[ticket.tenant].waiting[ticket] = None

    def finish(self, ticket: Ticket, *, whole: bool) -> None:
        """It gave its row back; `whole` if it was not cut short."""
        if ticket in self.running:
            self._end(ticket, ticket.prompt + ticket.written)
            if whole:
                self.pace.ended(ticket.written)
            self._forget()

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits for it any more; if it still waits, it leaves."""
        tenant = self._tenants.get(ticket.tenant)
        if tenant is not None and ticket in tenant.waiting:
            self._leave(ticket)
            self._forget()

    def overdue(self, now: float) -> Iterator[tuple[Ticket, AdmissionError]]:
        """Those that leave because they waited too long, or could not be answered in time from here."""
        for tenant in list(self._tenants.values()):
            for ticket in list(tenant.waiting):
                error: AdmissionError | None = None
                if now - ticket.arrived >= self.max_wait:
                    error = QueueTimeoutError(self.name, self.retry_after())
                elif now + (self._service(ticket) or 0.0) >= ticket.deadline:
                    error = DeadlineUnmeetableError(self.name)
                if error is not None:
                    self._leave(ticket)
                    yield ticket, error
        self._forget()

    def full(self) -> QueueFullError:
        """The error of one that has no place in the queue."""
        return QueueFullError(self.name, self.retry_after())

    def retry_after(self) -> float | None:
        """Seconds until a row is probably free; None before the pace is known."""
        left = [self._work(ticket) for ticket in self.running]
        if not left or None in left:
            return None
        return sum(filter(None, left)) / len(left)

    def wait_of(self, ticket: Ticket) -> float | None:
        """Seconds that one coming now would probably wait for its row; None before the pace is known."""
        if len(self.running) + self.waiting < self.rows:
            return 0.0
        free = 0.0 if len(self.running) < self.rows else self.retry_after()
        if free is None:
            return None
        mine = self._tenants.get(ticket.tenant)
        before = [one for one in mine.waiting if self._goes_before(one, ticket)] if mine else []
        start = (mine.virtual if mine else self._floor) + sum(one.tokens for one in before)
        ahead = self._seconds(before)
        for name, other in self._tenants.items():
            if name == ticket.tenant:
                continue
            ahead += self._seconds(one for one in other.waiting if one.priority > ticket.priority)
            equals = [one for one in other.waiting if one.priority == ticket.priority]
            if equals:  # its tenant has its share, however many the others have here
                tokens = sum(one.tokens for one in equals)
                ahead += self._seconds(equals) * min(1.0, max(0.0, start - other.virtual) / tokens)
        return free + ahead

    def _check_times(self, ticket: Ticket, now: float) -> None:
        """Refuse what would only wait to be refused later."""
        if ticket.deadline <= now:
            raise DeadlineUnmeetableError(self.name)
        service = self._service(ticket)
        if service is None:
            return
        if now + service > ticket.deadline:
            raise DeadlineUnmeetableError(self.name)  # not even alone; no use to come back with as little time
        wait = self.wait_of(ticket)
        if wait is None:
            return
        if (late := now + wait + service - ticket.deadline) > 0:
            raise DeadlineUnmeetableError(self.name, late)
        if wait > self.max_wait:
            raise QueueFullError(self.name, wait - self.max_wait)

    def _have_room(self, tickets: Sequence[Ticket], victims: Sequence[Ticket]) -> bool:
        waiting = self.waiting + len(tickets) - len(victims)
        free = max(0, self.rows - len(self.running))
        if waiting <= free:
            return True
        if waiting > self.max_queued + free:
            return False
        tokens = self.waiting_tokens + sum(one.tokens for one in tickets) - sum(one.tokens for one in victims)
        return tokens <= self.max_queued_tokens or waiting == len(tickets) == 1

    def _victim(self, newcomer: Ticket, spared: Sequence[Ticket], now: float) -> Ticket | None:
        """Whom it pushes out: the last of those that matter less, or of a tenant that holds more of the queue."""
        held = {name: tenant.tokens for name, tenant in self._tenants.items()}
        for one in spared:
            held[one.tenant] -= one.tokens
        mine = held.get(newcomer.tenant, 0) + newcomer.tokens
        worst: tuple[float, float, float, float] | None = None
        found: Ticket | None = None
        for ticket in self._waiting():
            level = self._level(ticket, now)
            greedy = level <= newcomer.priority and held[ticket.tenant] - ticket.tokens >= mine
            if ticket in spared or not (level < newcomer.priority or (greedy and ticket.tenant != newcomer.tenant)):
                continue
            rank = (-level, held[ticket.tenant], self._due(ticket), ticket.arrived)
            if worst is None or rank >= worst:
                worst, found = rank, ticket
        return found

    def _waiting(self) -> Iterator[Ticket]:
        return (ticket for tenant in self._tenants.values() for ticket in tenant.waiting)

    def _level(self, ticket: Ticket, now: float) -> float:
        return ticket.priority + (now - ticket.arrived) // self.aging

    @staticmethod
    def _due(ticket: Ticket) -> float:
        return min(ticket.deadline, ticket.arrived + _PATIENCE)

    def _goes_before(self, one: Ticket, newcomer: Ticket) -> bool:
        return (-one.priority, self._due(one)) <= (-newcomer.priority, self._due(newcomer))

    def _service(self, ticket: Ticket) -> float | None:
        return self.pace.service(ticket.prompt, self.pace.expected(ticket.answer))

    def _work(self, ticket: Ticket) -> float | None:
        prompt = 0 if ticket.written else ticket.prompt
        return self.pace.work(prompt, max(1.0, self.pace.expected(ticket.answer) - ticket.written))

    def _seconds(self, tickets: Iterable[Ticket]) -> float:
        return sum(self._work(ticket) or 0.0 for ticket in tickets)

    def _leave(self, ticket: Ticket) -> None:
        del self._tenants[ticket.tenant].waiting[ticket]

    def _end(self, ticket: Ticket, tokens: float) -> None:
        """Its row is free; its tenant pays what it really had."""
        del self.running[ticket]
        tenant = self._tenants[ticket.tenant]
        tenant.running -= 1
        tenant.virtual += tokens - ticket.charged
        ticket.charged = 0.0

    def _forget(self) -> None:
        """Let go of tenants that have nothing here and no debt; of those with the least, if they are too many."""
        idle = {name: one for name, one in self._tenants.items() if not one.waiting and not one.running}
        for name in [name for name, tenant in idle.items() if tenant.virtual <= self._floor]:
            del self._tenants[name], idle[name]
        if len(idle) > _MOST_TENANTS:
            for name in sorted(idle, key=lambda name: idle[name].virtual)[: len(idle) - _MOST_TENANTS // 2]:
                self._floor = max(self._floor, self._tenants.pop(name).virtual)
