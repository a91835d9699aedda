"""What a profile advises: what decode waits for, and what more memory would give."""

from dataclasses import replace
from functools import partial

from slotmoe.jsonfile import Json
from slotmoe.offload.plan.memory import make_plan, runtime_growth
from slotmoe.offload.plan.speed import Setting


def verdict(report: Json, setting: Setting, kernels: str, prompt: int, new: int) -> Json:
    """``text``, a sentence or two, and ``budgets``: sizes of the device tier's budget beyond this
    run's, each with the decode speed to expect of it, scaled by what this run measured."""
    spent = report["time"]["decode"]["milliseconds_per_token"]
    speed = report["decode_tokens_per_second"]
    if not spent or not speed:
        return {"text": "Too few tokens were decoded to say what bounds the speed.", "budgets": []}
    slowest = max(spent, key=spent.__getitem__)
    share = spent[slowest] / sum(spent.values())
    text = f"Decode makes {speed:.1f} tokens/s; {share:.0%} of a token's time is {slowest}."
    plan, config = setting.plan, setting.config
    missing = len(config.moe_layers) * config.n_routed_experts - plan.slots
    if missing <= 0:
        more = f"Every expert has a slot, so more --{plan.tier} makes it no faster."
        return {"text": f"{text} {more}", "budgets": []}
    whole = plan.total + missing * plan.record_bytes - plan.components["read buffers"]
    sizes = [whole] if whole <= plan.budget else [(plan.budget + whole) / 2, whole]
    # In steps of half a GiB, or below one of 10 MiB.
    units = [1 << 29 if size >= 1 << 30 else 10 << 20 for size in sizes]
    rounded = [-int(-size // unit) * unit for size, unit in zip(sizes, units, strict=True)]
    now, budgets, ways = _decode_speed(setting, plan.budget, kernels, prompt, new), [], []
    for size in dict.fromkeys(rounded):
        faster = speed * _decode_speed(setting, size, kernels, prompt, new) / now
        budgets.append({plan.tier: size, "decode_tokens_per_second": faster})
        asked = f"{size / (1 << 30):g}GiB" if size >= 1 << 30 else f"{size >> 20}MiB"
        is_capped = whole <= plan.budget  # only --slots keeps experts out
        way = "without --slots" if is_capped else f"with --{plan.tier} {asked}"
        ways.append(f"{way} about {faster:.1f}")
    return {"text": f"{text} It would make {', '.join(ways)} tokens/s.", "budgets": budgets}


def _decode_speed(setting: Setting, budget: int, kernels: str, prompt: int, new: int) -> float:
    """Predicted tokens a second within ``budget`` bytes of the device tier."""
    plan, config, sizes = setting.plan, setting.config, setting.sizes
    growth = runtime_growth(config, sum(sizes.resident.values()))
    runtime = plan.components.get("runtime", plan.host.get("runtime", growth)) - growth
    slots = plan.slots if budget == plan.budget else None
    host = plan.host_budget if plan.host else None
    like = partial(make_plan, tier=plan.tier, context=plan.context, kernels=kernels)
    wider = like(config, sizes, budget=budget, runtime_bytes=runtime, slots=slots, host_budget=host)
    return replace(setting, plan=wider).predict(prompt, new).decode_tokens_per_second
