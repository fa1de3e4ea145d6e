"""What a supernet is worth: the hypervolume of fixed policies, in a scale that is the same for every supernet.

All policies of a trial are known before it is trained, so that a value is a function of the supernet alone, without the
luck of a sampler. The reference points are nobody's measurements: the worse one keeps every chunk and knows nothing
(all answers wrong, every token as likely as any other), the better one keeps nothing and is always right. Whatever a
supernet's own ends are, the same gain counts the same in every trial.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from natsl.data import Split, TaskData
from natsl.errors import UserError
from natsl.evaluate import Evaluation
from natsl.model import RoutedLM
from natsl.search.baseline import baselines
from natsl.search.config import SearchConfig, SearchRunConfig
from natsl.search.front import Kind
from natsl.search.objective import OBJECTIVES, measure
from natsl.search.pareto import Scale, non_dominated
from natsl.search.prepare import make_problem
from natsl.search.rungs import Parts
from natsl.search.study import Problem
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks import metrics


@dataclass(frozen=True)
class Measured:
    """A policy of a supernet and its objectives on the search split."""

    policy: RoutingPolicy
    values: dict[str, float]


def fixed_policies(problem: Problem, config: SearchConfig) -> tuple[RoutingPolicy, ...]:
    """The policies that every supernet of this structure is judged by, each once.

    Those that a search of its policies tries first, ``search.policies`` and all anchors of the space (uniform budgets,
    single layers or heads), and ``search.uniform_budgets`` as far as the space holds them.
    """
    fixed = baselines(problem.kinds, problem.chunk_size, config.uniform_budgets, config.space)
    policies = {policy.digest(): policy for policy in problem.first}
    for policy in (named.policy for named in fixed if named.kind is Kind.uniform):
        with contextlib.suppress(ValueError):
            config.space.params(policy, problem.kinds, problem.heads)
            policies.setdefault(policy.digest(), policy)
    return tuple(policies.values())


def common_scale(configs: Sequence[SearchRunConfig]) -> Scale:
    """The scale for supernets of all these structures: from nothing kept and always right to all kept and a guess.

    Where structures cost differently, the ends are those of the cheapest and the dearest of them. ``UserError`` for an
    objective that does not compare structures, or supernets at all.
    """
    names = tuple(configs[0].search.objectives)
    for name in (*names, *configs[0].search.constraints):
        if name in OBJECTIVES and OBJECTIVES[name].timed:
            raise UserError(f"objective {name!r} is not for an outer search: choose decode_bytes or prefill_flops")
    shapes = {(tuple(sorted(kind.value for kind in c.model.layers)), c.model.chunk_size) for c in configs}
    if len(shapes) > 1 and "kept_fraction" in names:
        raise UserError(
            "objective 'kept_fraction' does not compare chunk sizes or kinds of layers, whose chunks and routers are "
            "others: choose kv_bytes_per_token, decode_bytes, prefill_flops or cache_bytes"
        )
    ends = [_ends(config) for config in configs]
    best = {name: min(end[0][name] for end in ends) for name in names}
    return Scale.between(names, best, {name: max(end[1][name] for end in ends) for name in names})


def _ends(config: SearchRunConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Objectives of a model of this structure that keeps nothing and is right; of one that keeps all and guesses."""
    problem = make_problem(config)
    kinds, heads, guess = problem.kinds, problem.heads, math.log(config.model.vocab_size)
    found = []
    for loss, error, kept in ((0.0, 0.0, 0.0), (guess, 1.0, 1.0)):
        fractions = tuple(kept if kind is Op.routed else float(kind is Op.softmax) for kind in kinds)
        evaluation = Evaluation(
            val_loss=loss,
            bits_per_byte=loss / math.log(2),
            errors=dict.fromkeys(metrics().values(), error),
            kept_fraction=kept,
            kept_by_layer=fractions,
            kept_by_head=tuple((fraction,) * heads for fraction in fractions),
        )
        end = RoutingPolicy.all_softmax if kept else RoutingPolicy.all_delta
        found.append(measure(config.search.objectives, evaluation, end(kinds, problem.chunk_size), problem.costs))
    return found[0], found[1]


def judge(model: RoutedLM, data: TaskData, problem: Problem, config: SearchConfig) -> list[Measured]:
    """The front of the fixed policies on the search split, constraints kept; empty if none keeps them.

    A policy whose results are not finite is left out; ``FloatingPointError`` if that is so of all.
    """
    policies, names = fixed_policies(problem, config), list(config.objectives)
    parts = Parts(model, data.eval_sets(Split.search), [1.0], config.batch_size)
    good: list[Measured] = []
    finite = 0
    for policy, results in zip(policies, parts.judge_each(policies, False), strict=True):
        with contextlib.suppress(FloatingPointError, KeyError):
            values = measure(names, results[1.0], policy, problem.costs)
            limited = measure(list(config.constraints), results[1.0], policy, problem.costs)
            finite += 1
            if all(limited[name] <= bound for name, bound in config.constraints.items()):
                good.append(Measured(policy, values))
    if not finite:
        raise FloatingPointError(
            f"none of the {len(policies)} policies that a supernet is judged by has finite results"
        )
    return [good[i] for i in non_dominated([item.values for item in good], names)]
