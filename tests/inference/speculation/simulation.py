"""A world of scripted acceptance, costs and load around the controller; times are numbers."""

import random

from seawall.inference.generate.speculation import Controller, Costs, Pace, Proposal

PACE = Pace(1.0, 1.1, 0.05)  # plain pass, pass over two tokens, every further token


def simulate(acceptance, *, cost=0.0, tokens=400, load=lambda done: 1.0, noise=0.05, seed=0, offered=16, chance=None):
    """Speed-up over plain decoding under the same load, with one drafter.

    `acceptance` and `load` are functions of the tokens written so far, `cost` is that of a drafted token in plain
    passes: 0 for a free drafter, of which every next token is scored.
    """
    rng = random.Random(seed)
    controller = Controller([(chance or (0.4 if cost == 0 else 0.9),)], Costs(PACE, [cost]), most=16)
    done, spent, plain = 0, 0.0, 0.0
    while done < tokens:
        room = min(tokens - done - 1, 16)
        plan = controller.plan([[Proposal(1)] * offered if cost == 0 else None], room)
        hits = drafts(controller, plan, cost, offered, lambda d=done: rng.random() < acceptance(d))
        accepted = hits.index(False) if False in hits else len(hits)
        for hit in hits[: accepted + 1]:
            controller.score(0, 0, hit)
        if not hits and cost == 0 and offered:
            controller.score(0, 0, rng.random() < acceptance(done))
        slow = load(done) * rng.uniform(1 - noise, 1 + noise)
        drafting = len(hits) * cost * slow
        passing = (PACE.pair + PACE.more * (len(hits) - 1) if hits else PACE.plain) * slow
        controller.learn(plan, len(hits), accepted + 1, drafting, passing)
        done += accepted + 1
        spent += drafting + passing
        plain += (accepted + 1) * load(done)
    return plain / spent


def drafts(controller, plan, cost, offered, hit):
    """Whether each drafted token is what the target says."""
    if plan.drafter is None:
        return []
    if cost == 0:
        return [hit() for _ in range(min(plan.most, offered))]
    hits, survival = [hit()], controller.chance(0, 0)
    while controller.another(plan, survival, len(hits)):
        hits.append(hit())
        survival *= controller.chance(0, 0)
    return hits


def best(acceptance, cost):
    """Speed-up of the best fixed length, by the closed form."""
    lengths = ((sum(acceptance**i for i in range(k + 1)), k) for k in range(17))
    return max(found / (k * cost + (PACE.pair + PACE.more * (k - 1) if k else 1.0)) for found, k in lengths)
