"""The verbs ``scfm scaling fit``, ``plot``, ``predict`` and ``recommend``, each thin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from scfm_jax.console import Bar, print_json
from scfm_jax.errors import InputError
from scfm_jax.flags import MOST_DRAWS, check_count

if TYPE_CHECKING:
    from scfm_jax.scaling.law import Law
    from scfm_jax.scaling.recommend import Recommendation

_NAMED = 3  # runs of a kind
_LACK_OF_FIT = 0.01  # a chance below which the form is said not to fit
_MFU = 0.35


def fit(
    results: Positional[Annotated[Path, arg(metavar="RESULTS.jsonl")]],
    /,
    output: Annotated[Path, arg(aliases=["-o"])],
    family: Annotated[str | None, arg(metavar="NAME")] = None,
    only: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = (),
    without: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = (),
    size: Literal["parameters_without_embeddings", "parameters"] = "parameters_without_embeddings",
    data: Literal["unique_cells", "cells", "tokens"] = "unique_cells",
    form: Annotated[
        Literal["plain", "offset", "offset_size", "offset_data", "power", "power_size"] | None,
        arg(metavar="FORM"),
    ] = None,
    draws: int = 1_000,
    held_out: int = 1,
    repeats: bool = False,
    drop_nan: bool = False,
    delta: float = 1e-3,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Fit a scaling law to the runs of a results file: parameters with intervals, or why they have none.

    Parameters
    ----------
    results
        A file of JSON lines, one run each; docs/scaling.md lists the fields.
    output
        The new file of the law (.json), for scfm scaling plot, predict and recommend.
    family
        The family whose runs are fitted (tissue, nicheformer), where the file has several.
    only
        Names of the runs to take, where * stands for anything: 'w16-*' 'w32-*'.
    without
        Names of runs to leave out, where * stands for anything: '*-ring' '*-exchanged' for controls.
    size
        How the size N of a model is counted.
    data
        How the data D of a run is counted: different cells, cells seen, or tokens seen.
    form
        The form of the law: plain, offset, offset_size, offset_data, power or power_size. If not given,
        offset (a floor for each k), or plain where all runs have one k.
    draws
        Draws of the bootstrap over runs; 100 at least.
    held_out
        Largest budgets of FLOPs that are left out, their runs predicted from the others; 0 for none.
    repeats
        Fit the law to runs of one epoch or less, and to the others what repeated data is worth.
    drop_nan
        Leave runs out whose loss is no number.
    delta
        Residual of the log loss from which on the Huber estimator counts it linearly.
    seed
        Seed of the bootstrap and of all else that is drawn.
    json
        Print the law as JSON, without runs and draws.
    """
    from scfm_jax.downstream.outputs import check_new, written_whole
    from scfm_jax.scaling.law import LawConfig, fit_law
    from scfm_jax.scaling.law_file import record_of, write_law
    from scfm_jax.scaling.runs import read_runs

    check_count("--draws", draws, 100, MOST_DRAWS)
    check_count("--held-out", held_out, 0)
    check_count("--seed", seed, 0)
    if not 0 < delta < 1:
        raise InputError("--delta", f"{delta} is no deviation of a log loss", "give a number from 0 to 1")
    check_new(output)
    runs, dropped = read_runs(results, family=family, only=only, without=without, drop_nan=drop_nan)
    config = LawConfig(size, data, form, draws, held_out, repeats, delta, seed)
    with Bar("fitting", quiet=json) as bar:
        law = fit_law(runs, config, dropped=dropped, where=results, progress=bar.update)
    with written_whole(output) as partial:
        write_law(law, partial)
    if json:
        print_json({key: value for key, value in record_of(law).items() if key not in ("runs", "draws")})
        return
    print("\n".join(_law_lines(law)))
    print(f"the law: {output}")


def plot(
    law: Positional[Annotated[Path, arg(metavar="LAW.json")]],
    out: Positional[Annotated[Path, arg(metavar="FOLDER")]],
    /,
    json: bool = False,
) -> None:
    """Draw a law: loss against compute, IsoFLOP curves, residuals, k, intervals, predictions; PNG and SVG.

    Parameters
    ----------
    law
        A file that scfm scaling fit wrote.
    out
        The new folder of the figures, each as .png and .svg.
    json
        Print the captions of the figures as JSON.
    """
    from scfm_jax.downstream.outputs import check_new, written_whole
    from scfm_jax.scaling.law_figures import draw_law
    from scfm_jax.scaling.law_file import read_law

    check_new(out)
    fitted = read_law(law)
    with written_whole(out) as partial:
        captions = draw_law(fitted, partial)
    if json:
        print_json(captions)
        return
    for name, caption in captions.items():
        drawn = (out / f"{name}.png").exists()
        print(f"{name}: {caption}" if drawn else f"{name}: not drawn, {caption}")
    print(f"the figures: {out}")


def recommend(
    law: Positional[Annotated[Path, arg(metavar="LAW.json")]],
    /,
    flops: Annotated[float | None, arg(metavar="FLOPS")] = None,
    chips: Annotated[int | None, arg(metavar="NUMBER")] = None,
    hours: Annotated[float | None, arg(metavar="HOURS")] = None,
    device: Annotated[str | None, arg(metavar="NAME")] = None,
    mfu: Annotated[float | None, arg(metavar="SHARE")] = None,
    extrapolate: bool = False,
    json: bool = False,
) -> None:
    """Say which size, data and neighbours a budget is best spent on, and the recipe to start from.

    Parameters
    ----------
    law
        A file that scfm scaling fit wrote.
    flops
        The budget in model FLOPs of the whole training. In its place --chips, --hours and --device.
    chips
        Number of accelerators that the training has, with --hours and --device.
    hours
        Hours that the training has, with --chips and --device.
    device
        Kind of accelerator: v4, v5e, v5p, v6e, a100, h100, h200 or b200.
    mfu
        Share of the accelerators' dense bf16 peak that model FLOPs reach, .35 if not given; scfm plan says
        how much at most.
    extrapolate
        Answer where the law refuses to, and say why it would refuse.
    json
        Print the answer as JSON.
    """
    import dataclasses

    from scfm_jax.scaling import recommend as frontier
    from scfm_jax.scaling.law_file import read_law

    machine = (chips, hours, device)
    if any(each is not None for each in (*machine, mfu)) if flops is not None else None in machine:
        raise InputError(
            "--flops", "is not the one budget given", "give it, or --chips, --hours and --device"
        )
    if flops is None:
        assert chips is not None and hours is not None and device is not None
        flops = frontier.budget_of(chips, hours, device, _MFU if mfu is None else mfu)
    fitted = read_law(law)
    answer = frontier.recommend(fitted, flops, extrapolate=extrapolate, where=law)
    if json:
        print_json(dataclasses.asdict(answer))
    else:
        print("\n".join(_recommendation_lines(answer)))


def predict(
    law: Positional[Annotated[Path, arg(metavar="LAW.json")]],
    /,
    size: float,
    data: float,
    k: int = 0,
    extrapolate: bool = False,
    json: bool = False,
) -> None:
    """Say what loss a run will have before it is run, with the interval that a single run lies in.

    Parameters
    ----------
    law
        A file that scfm scaling fit wrote.
    size
        Size N of the model, counted as the law counts it; scfm scaling run --plan prints it for a sweep.
    data
        Data D of the run, counted as the law counts it; scfm scaling run --plan prints it for a sweep.
    k
        Neighbours of a centre cell, a number that was measured.
    extrapolate
        Answer far from what was measured too.
    json
        Print the answer as JSON.
    """
    import dataclasses

    from scfm_jax.scaling.law_file import read_law
    from scfm_jax.scaling.recommend import predict_run

    said = predict_run(read_law(law), size, data, k, extrapolate=extrapolate)
    if json:
        print_json({"size": size, "data": data, "k": k} | dataclasses.asdict(said))
        return
    run = f"N {size:.3g}, D {data:.3g}, k {k}, {said.flops:.3g} FLOPs"
    print(f"{run}: loss {said.loss:.4g} {_interval(said.interval)}")
    for remark in said.remarks:
        print(f"beware: {remark}")


def _law_lines(law: Law) -> list[str]:
    """The law for a reader."""
    runs = f"{len(law.runs)} runs of {law.runs.family}"
    dropped = f"; {len(law.dropped)} without a loss left out: {', '.join(law.dropped)}" if law.dropped else ""
    return [
        f"L(N, D, k) = {law.form.equation}, N {law.config.size}, D {law.config.data}; {runs}{dropped}",
        "",
        *_parameter_lines(law),
        "",
        *_neighbour_lines(law),
        "",
        *_form_lines(law),
        "",
        *_budget_lines(law),
        *_repeat_lines(law),
        *_run_lines(law),
    ]


def _parameter_lines(law: Law) -> list[str]:
    lines = [f"{'parameter':<12}{'value':>10}  {'95%, bootstrap':<24}{'95%, profile':<24}{'Huber':>10}"]
    for each in law.parameters:
        if each.value is None or each.bootstrap is None or each.profile is None:
            lines.append(f"{each.name:<12}not identified: {each.why}")
            continue
        ends = f"{_interval(each.bootstrap):<24}{_interval(each.profile):<24}"
        lines.append(f"{each.name:<12}{each.value:>10.4g}  {ends}{law.huber[each.name]:>10.4g}")
    return lines


def _neighbour_lines(law: Law) -> list[str]:
    seeds = law.noise.freedom > 0
    noise = f"{law.noise.deviation:.3g} between seeds" if seeds else "not measured, no seed was repeated"
    lines, least = [f"residuals {law.deviation:.3g}; noise {noise}"], law.design.levels[0]
    chance = law.lack_of_fit
    if chance is not None and chance < _LACK_OF_FIT:
        lines.append(
            f"beware: the runs lie farther from this form than seeds scatter (F test, p = {chance:.1g}): "
            "its intervals are those of the form, and say nothing of another"
        )
    for each in law.effects:
        lines.append(f"k = {each.k} against {least}: {each.difference:+.3g} {_interval(each.interval)}")
    if len(law.design.levels) > 1 and law.power_law:
        lines.append(f"power law in k: not identified, {law.power_law}")
    return lines


def _form_lines(law: Law) -> list[str]:
    lines = [f"{'form':<14}{'parameters':>10}{'held-out error':>16}{'AICc':>12}"]
    for each in law.compared:
        error = "-" if each.held_out_error is None else f"{each.held_out_error:.3%}"
        aic = "-" if each.aic is None else f"{each.aic:.1f}"
        alone = f"  ({each.unpredictable} runs that the others cannot predict)" if each.unpredictable else ""
        lines.append(f"{each.form:<14}{each.parameters:>10}{error:>16}{aic:>12}{alone}")
    return lines


def _budget_lines(law: Law) -> list[str]:
    from scfm_jax.scaling.isoflop import best_neighbours
    from scfm_jax.scaling.recommend import frontier_of

    lines = []
    for trend in law.trends:
        interval = f" {_interval(trend.size_interval)}" if trend.size_interval else ""
        best = f"N* ~ C^{trend.size_exponent:.3f}{interval}, D* ~ C^{trend.data_exponent:.3f}"
        lines.append(f"IsoFLOP, k = {trend.k}: {best} ({trend.budgets} budgets)")
    for each in law.parabolas:
        if each.why:
            lines.append(f"IsoFLOP, k = {each.k}, {each.flops:.2g} FLOPs: refused, {each.why}")
    for k, (slope, _) in law.envelopes.items():
        lines.append(f"envelope, k = {k}: N* ~ C^{slope:.3f}")
    for flops, k in best_neighbours(law.parabolas):
        lines.append(f"IsoFLOP, {flops:.3g} FLOPs: the lowest vertex is that of k = {k}")
    rows = frontier_of(law)
    if rows:
        lines += ["", f"{'FLOPs':<11}{'k*':>4}{'in draws':>10}  {'N*':<33}{'D*':<33}loss"]
    for flops, (best_choice, *_) in rows:
        size = f"{best_choice.size:.3g} {_interval(best_choice.size_interval)}"
        data = f"{best_choice.data:.3g} {_interval(best_choice.data_interval)}"
        loss = f"{best_choice.loss:.4g} {_interval(best_choice.loss_interval)}"
        lines.append(
            f"{flops:<11.3g}{best_choice.k:>4}{best_choice.share:>10.0%}  {size:<33}{data:<33}{loss}"
        )
    return [*lines, *(f"frontier: refused, {why}" for why in law.refusals), ""]


def _repeat_lines(law: Law) -> list[str]:
    if law.repeats is None:
        return []
    lines = []
    for what, value, ends, why in (
        ("data", law.repeats.data, law.repeats.data_interval, law.repeats.data_why),
        ("size", law.repeats.size, law.repeats.size_interval, law.repeats.size_why),
    ):
        said = f"{value:.3g} {_interval(ends)}" if value is not None and ends else f"not identified: {why}"
        lines.append(f"R* of {what}, {law.repeats.runs} repeated runs: {said}")
    return lines


def _run_lines(law: Law) -> list[str]:
    lines = []
    for each in law.predictions[:_NAMED]:
        said = f"{each.predicted:.4g} {_interval(each.interval)}, measured {each.measured:.4g}"
        lines.append(f"left out and predicted: {each.run} {said}")
    inside = sum(each.interval[0] <= each.measured <= each.interval[1] for each in law.predictions)
    number = len(law.predictions)
    if number:
        lines.append(f"of {number} largest runs, {inside} lie in the interval of their prediction")
    else:
        lines.append(f"largest runs not predicted: {law.predictions_why}")
    driving = [
        f"{each.run} ({each.parameter} {each.shift:+.2f} standard errors)" for each in law.influence[:_NAMED]
    ]
    return [*lines, *([f"runs that drive the fit: {', '.join(driving)}"] if driving else [])]


def _recommendation_lines(answer: Recommendation) -> list[str]:
    """The answer for a reader."""
    best, rest = answer.choices[0], answer.choices[1:]
    lines = [
        f"{answer.flops:.3g} FLOPs are best spent on",
        f"  N     {best.size:.3g} {_interval(best.size_interval)} {answer.size_field}",
        f"  D     {best.data:.3g} {_interval(best.data_interval)} {answer.data_field}",
        f"  k     {best.k}, the best in {best.share:.0%} of draws",
        f"  loss  {best.loss:.4g} {_interval(best.loss_interval)}",
    ]
    for other in rest:
        lines.append(
            f"  with k = {other.k}: N {other.size:.3g}, D {other.data:.3g}, loss {other.loss:.4g} "
            f"{_interval(other.loss_interval)}, the best in {other.share:.0%}"
        )
    if answer.isoflop:
        lines.append(f"  by IsoFLOP parabolas: N {answer.isoflop[0]:.3g}, D {answer.isoflop[1]:.3g}")
    if answer.start is not None:
        lines.append(
            f"start from {answer.start.recipe}: {answer.start.parameters:,} {answer.size_field}, of which "
            f"{answer.start.ratio:.3g} times are asked for"
        )
    ranges = ", ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in answer.measured.items())
    return [*lines, f"it rests on runs of {ranges}", *(f"beware: {remark}" for remark in answer.remarks)]


def _interval(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:.4g}, {ends[1]:.4g}]"


VERBS: dict[str, Callable[..., Any]] = {
    "scaling fit": fit,
    "scaling plot": plot,
    "scaling predict": predict,
    "scaling recommend": recommend,
}
