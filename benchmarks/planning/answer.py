"""A plan as text for a reader, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks.planning.evaluation import Estimate, Figures
from benchmarks.planning.planner import NoPlan, Plan
from benchmarks.planning.question import Question
from benchmarks.planning.workload import Workload
from icportrait.phases import ALL_STEPS


def to_json(question: Question, answers: Sequence[Plan | NoPlan], requests: int, took_s: float) -> dict[str, Any]:
    """Return a plan as figures for JSON; null stands for what isn't finite.

    Args:
        question: what was asked.
        answers: by GPU, the cheapest first.
        requests: that were simulated.
        took_s: the seconds of all of it.
    """
    goal = question.goal
    return {
        "kind": "plan",
        "question": {
            "rate_per_s": question.workload.rate_per_s,
            "mean_steps": round(question.workload.mean_steps, 2),
            "mean_rows": round(question.workload.mean_rows, 3),
            "burstiness": question.workload.burstiness,
            "returning": question.workload.returning,
            "slo": {name: value for name, value in vars(goal).items() if value is not None},
            "headroom": question.headroom,
            "spare": question.spare,
            "zones": question.zones,
            "survive_zone": question.survive_zone,
            "balancer": question.balancer,
            "slots": question.settings.policy.slots,
            "currency": question.currency,
            "seed": question.seed,
        },
        "answers": [_plan_json(answer) if isinstance(answer, Plan) else _no_plan_json(answer) for answer in answers],
        "simulated": {"requests": requests, "took_s": round(took_s, 2)},
    }


def table(question: Question, answers: Sequence[Plan | NoPlan], requests: int, took_s: float) -> str:
    """Write a plan as lines for a reader."""
    workload, goal = question.workload, question.goal
    promises = [f"p99 within {goal.p99_ms:g} ms"] if goal.p99_ms is not None else []
    promises += [f"{goal.goodput:.2%} within {goal.limit_ms:g} ms"] if goal.goodput is not None else []
    lines = [
        f"{workload.rate_per_s:g} requests a second, {' and '.join(promises)}",
        _load_line(workload) + f"; planned for {workload.rate_per_s * (1 + question.headroom):g}/s",
        "",
    ]
    for answer in answers:
        lines += _plan_lines(question, answer) if isinstance(answer, Plan) else _no_plan_lines(answer)
        lines.append("")
    lines.append(f"{requests} requests simulated in {took_s:.1f} s; intervals are 90 % ones, of independent runs")
    return "\n".join(lines)


def _load_line(workload: Workload) -> str:
    steps = sorted(workload.steps)
    parts = [f"steps {steps[0]}" + (f"..{steps[-1]}" if len(steps) > 1 else "") + f" (mean {workload.mean_steps:.1f})"]
    parts += [f"{workload.guided:.0%} guided"] if workload.guided else ["no guidance"]
    if workload.guided and workload.guidance_interval != ALL_STEPS:
        parts[-1] += " in {:g}..{:g} of their steps".format(*workload.guidance_interval)
    parts.append(f"bursts {workload.burstiness:g}" if workload.burstiness != 1 else "Poisson")
    parts += [f"{workload.returning:.0%} of profiles return"] if workload.returning else []
    return ", ".join(parts)


def _plan_lines(question: Question, plan: Plan) -> list[str]:
    figures, profile, goal = plan.figures, plan.profile, question.goal
    scenario = figures.scenario
    spare = plan.total - plan.replicas
    extra = f", and {spare} for redundancy: {plan.total}" if spare else ""
    lines = [
        f"{profile.name}: {plan.replicas} replicas{extra}  ({profile.device}, {profile.precision}, engine times"
        f" {profile.origin})",
        f"  at the planned rate   p50 {_ms(figures.p50_ms)}, p99 {_ms(figures.p99_ms)},"
        f" goodput {_share(figures.goodput)}",
        *(
            [f"  usually, on all       p50 {_ms(plan.normal.p50_ms)}, p99 {_ms(plan.normal.p99_ms)}"]
            if spare or question.headroom
            else []
        ),
        f"  busy                  {_busy(figures)}; {figures.batches['unet']:.1f} rows a step",
        f"  portraits             {plan.images_an_hour:,.0f} an hour"
        + (
            f", {plan.cost_an_hour:,.2f} {question.currency} an hour, "
            f"{plan.images_an_hour / plan.cost_an_hour:,.0f} portraits for 1 {question.currency}".rstrip()
            if plan.cost_an_hour
            else f"; no price was given for {profile.device}"
            if plan.cost_an_hour is None
            else ", for nothing"
        ),
        f"  breaks first          {plan.breaks_first}",
    ]
    if plan.day:
        least, most = min(plan.day), max(plan.day)
        hours = sum(plan.day)
        cost = f", {hours * plan.hour_price:,.2f} {question.currency} a day".rstrip() if plan.hour_price else ""
        lines.append(f"  by the hour           {least} to {most} replicas, {hours} GPU hours a day{cost}")
    lines.append(_bound_line(plan))
    lines.append("  load of the planned   p50 ms   p99 ms (90 % interval)   goodput   device busy")
    for share, each in plan.knee:
        lines.append(
            f"    {share:>8.0%}          {_figure(each.p50_ms.value):>8} {_figure(each.p99_ms.value):>8}"
            f" ({_figure(each.p99_ms.low)} to {_figure(each.p99_ms.high)})".ljust(56)
            + f"{each.goodput.value:>9.1%}   {each.busy['device']:>10.0%}"
        )
    lines.append("  with the same replicas, one input changed")
    for change in plan.changes:
        kept = "keeps the goal" if change.keeps_goal else "does NOT keep the goal"
        lines.append(
            f"    {change.name + f' x {change.factor:g}':<20}p99 {_ms(change.figures.p99_ms)},"
            f" goodput {change.figures.goodput.value:.1%}: {kept}"
        )
    lines += [f"  assumed: {assumption}" for assumption in profile.assumptions]
    if profile.host.note:
        lines.append(f"  host: {profile.host.note}")
    if scenario.balancer == "round-robin":
        lines.append("  the balancer deals requests in turn; with a random one the p99 is higher")
    if goal.p99_ms is not None and figures.p99_ms.high > goal.p99_ms:
        lines.append("  NOTE: the goal isn't kept by the upper end of the interval")
    return lines


def _bound_ms(plan: Plan) -> float | None:
    """Return the bound of the mean latency, infinite where whole batches can't serve the rate.

    Returns:
        None where the bound doesn't apply.
    """
    figures = plan.figures
    workload, slots = figures.scenario.workload, figures.scenario.settings.policy.slots
    rate = workload.rate_per_s / figures.scenario.replicas
    bound_s = plan.bound.mean_latency_s(rate)
    if not math.isfinite(bound_s):
        return math.inf
    if plan.bound.mean_batch(rate) > slots / workload.mean_rows or workload.burstiness != 1:
        return None
    host_ms = sum(figures.stage_ms.get(stage, 0.0) for stage in ("front", "preprocess", "postprocess", "back"))
    return 1000 * bound_s + host_ms


def _bound_line(plan: Plan) -> str:
    bound_ms = _bound_ms(plan)
    text = f"  mean latency          {_figure(plan.figures.mean_ms)} ms simulated; "
    if bound_ms is None:
        return text + "the bound of whole batches (arXiv 1912.06322) doesn't apply: bursts, or batches beyond the slots"
    if math.isinf(bound_ms):
        return text + "whole batches could not serve this rate (arXiv 1912.06322)"
    return text + f"whole batches of the mean request at most {bound_ms:.0f} ms (bound of arXiv 1912.06322)"


def _no_plan_lines(answer: NoPlan) -> list[str]:
    return [f"{answer.profile.name}: no number of replicas keeps the goal; {answer.reason}"]


def _plan_json(plan: Plan) -> dict[str, Any]:
    profile, figures = plan.profile, plan.figures
    cost, bound_ms = plan.cost_an_hour, _bound_ms(plan)
    return {
        "profile": profile.name,
        "device": profile.device,
        "preset": profile.preset.name,
        "precision": profile.precision,
        "origin": profile.origin,
        "assumptions": list(profile.assumptions),
        "replicas": plan.replicas,
        "total": plan.total,
        "planned_rate_per_s": round(figures.scenario.workload.rate_per_s, 4),
        "planned": figures_json(figures),
        "normal": figures_json(plan.normal),
        "images_an_hour": round(plan.images_an_hour, 1),
        "cost_an_hour": None if cost is None else round(cost, 4),
        "images_per_currency_unit": None if not cost else round(plan.images_an_hour / cost, 1),
        "breaks_first": plan.breaks_first,
        "replicas_by_hour": list(plan.day),
        "batch_service_bound_ms": round(bound_ms, 1) if bound_ms and math.isfinite(bound_ms) else None,
        "knee": [{"load": share, **figures_json(each)} for share, each in plan.knee],
        "changes": [
            {
                "input": change.name,
                "factor": change.factor,
                "keeps_goal": change.keeps_goal,
                **figures_json(change.figures),
            }
            for change in plan.changes
        ],
    }


def _no_plan_json(answer: NoPlan) -> dict[str, Any]:
    return {
        "profile": answer.profile.name,
        "device": answer.profile.device,
        "replicas": None,
        "reason": answer.reason,
        "alone": figures_json(answer.figures),
    }


def figures_json(figures: Figures) -> dict[str, Any]:
    """Return a scenario's figures for JSON."""
    return {
        "requests": figures.requests,
        "p50_ms": figures.p50_ms.to_json(),
        "p99_ms": figures.p99_ms.to_json(),
        "answered": figures.answered.to_json(),
        "goodput": figures.goodput.to_json(),
        "mean_ms": round(figures.mean_ms, 2) if math.isfinite(figures.mean_ms) else None,
        "busy": {name: round(share, 4) for name, share in figures.busy.items()},
        "rows_a_run": {name: round(rows, 3) for name, rows in figures.batches.items()},
        "stage_ms": {name: round(duration_ms, 2) for name, duration_ms in figures.stage_ms.items()},
        "codes": dict(figures.codes),
    }


def _busy(figures: Figures) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in figures.busy.items() if name != "loop")


def _ms(estimate: Estimate) -> str:
    return f"{_figure(estimate.value)} ms ({_figure(estimate.low)} to {_figure(estimate.high)})"


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.2%} ({estimate.low:.2%} to {estimate.high:.2%})"


def _figure(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "none"
