"""What a search is made of, and the user's mistakes in it that are known before anything is trained."""

from __future__ import annotations

from dataclasses import replace

import torch

from natsl.config import Precision, check_batch, check_chunks
from natsl.data import Split, TaskData
from natsl.errors import UserError
from natsl.files import user_path, write_json
from natsl.load import read_policy
from natsl.record import TrainedText
from natsl.run import Run
from natsl.search.config import SearchRunConfig
from natsl.search.objective import OBJECTIVES, CostContext, Role, find_objectives
from natsl.search.rungs import useful
from natsl.search.source import held_out_data, take_settings
from natsl.search.study import Problem, first_policies
from natsl.space.policy import Op, RoutingPolicy
from natsl.tasks.sequences import IGNORED


def prepare(config: SearchRunConfig) -> tuple[SearchRunConfig, Problem, TaskData, TrainedText | None]:
    """What a search is made of, and the configuration with what it takes from elsewhere; errors as ``run_search``.

    The last one as ``held_out_data``. Writes nothing.
    """
    config = take_settings(config)
    rungs = useful(config.search.rungs, config.data.search_sequences)
    config = replace(config, search=replace(config.search, rungs=rungs))
    if config.supernet_from is None:
        check_batch(config.model.layers, config.train, config.supernet)
    check_chunks(config.model.chunk_size, config.data.seq_len)
    problem = make_problem(config)
    data, trained = held_out_data(config)
    check_text(config, data)
    return config, problem, data, trained


def make_problem(config: SearchRunConfig) -> Problem:
    """What the search asks; ``ValueError`` if the space, the objectives or the first policies do not fit the model."""
    model = config.model
    kinds = tuple(model.layers)
    if Op.routed not in kinds:
        names = ", ".join(kind.value for kind in kinds)
        raise UserError(f"model.layers = [{names}] is not allowed: a search needs at least one routed layer")
    tasks = {name for name, weight in config.data.tasks.items() if weight > 0}
    objectives = find_objectives(config.search.objectives, tasks, config.search.constraints)
    given = [_read_first_policy(path, config) for path in config.search.policies]
    first = first_policies(config.search, model.layer_shapes(), model.chunk_size, given)
    context = config.data.seq_len if config.search.context is None else config.search.context
    size = 2 if config.train.precision is Precision.bfloat16 else 4
    costs = CostContext(model.layer_shapes(), context, size)
    own = len(dict.fromkeys(policy.digest() for policy in given))
    return Problem(kinds, model.chunk_size, costs, objectives, first, own)


def with_times(problem: Problem, config: SearchRunConfig, run: Run, device: torch.device) -> Problem:
    """The problem with the table that its timed objectives and constraints are read from, if it has any.

    A run keeps the table that it began with, on whatever device it is resumed.
    """
    search = config.search
    if not any(OBJECTIVES[name].timed for name in (*search.objectives, *search.constraints)):
        return problem
    from natsl.latency import Setting, obtain_table, read_table

    table = read_table(run.latency)
    if table is None:
        setting = Setting(config.model, config.train.precision, device, search.cost_batch_size)
        lengths = {problem.costs.context, *(factor * config.data.seq_len for factor in search.lengths)}
        table = obtain_table(setting, sorted(lengths))
        write_json(run.latency, table.to_dict())
    return replace(problem, costs=replace(problem.costs, latency=table))


def _read_first_policy(path: str, config: SearchRunConfig) -> RoutingPolicy:
    """A policy that the user wants tried first; ``UserError`` naming its file if it is outside the space."""
    policy = read_policy(user_path(path, "search.policies"), "search.policies")
    try:
        first_policies(config.search, config.model.layer_shapes(), config.model.chunk_size, [policy])
    except ValueError as error:
        raise UserError(f"search.policies: {path}: {error}") from None
    return policy


def check_text(config: SearchRunConfig, data: TaskData) -> None:
    """Raise ``ValueError`` for an objective or a constraint that the text does not have.

    One about bytes needs text instead of token ids, and any about text needs sequences that score some.
    """
    names = (*config.search.objectives, *config.search.constraints)
    of_bytes = [name for name in names if OBJECTIVES[name].of_bytes]
    if of_bytes and data.corpus.tokens:
        raise UserError(
            f"objective {of_bytes[0]!r} is not defined for token ids, which data.path = {config.data.path!r} holds: "
            "choose val_loss instead"
        )
    about_text = [name for name in names if OBJECTIVES[name].role is Role.quality and OBJECTIVES[name].task is None]
    for split in (Split.search, Split.test) if about_text else ():
        batches = data.eval_sets(split).values()
        if not any(bool(((batch.targets != IGNORED) & ~batch.recall).any()) for batch in batches):
            raise UserError(
                f"objective {about_text[0]!r} needs text: no sequence of data.seq_len = {data.config.seq_len} has any "
                f"that is scored in the {split.value} part: raise data.seq_len or add data.tasks.bytes"
            )
