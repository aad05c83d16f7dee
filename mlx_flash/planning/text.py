"""Plans and profiles as a person reads them. GB is 1e9, MB is 1e6."""

from ..profile import Profile
from .plan import Plan
from .several import Several


def plan_text(p: Plan) -> str:
    """A plan in lines of a name and figures."""
    beside = f", {_size(p.block_bytes)} as blocks" if p.block_bytes else ""
    if p.table_bytes:
        beside += f", {_size(p.table_bytes)} of embeddings as rows"
    lines = [
        f"{p.model}: {p.kind}, {p.model_type}, {p.dtype}",
        "",
        f"model        {_size(p.model_bytes)}: {_size(p.resident_bytes)} stay in "
        f"memory, {_size(p.ffn_bytes)} of FFNs on flash as {p.unit}s{beside}",
        f"memory       {_size(p.memory_bytes)} given; the least is "
        f"{_size(p.least_bytes)}, more than {_size(p.best_bytes)} changes nothing "
        f"({p.context:,} tokens of context)",
        f"in memory    {p.held_share:.0%} of the {p.unit}s, {p.layers_held_whole} of "
        f"{p.layers} layers whole; predictors {_size(p.predictor_bytes)}, KV cache "
        f"{_size(p.kv_bytes)}",
    ]
    disk = []
    if p.download_bytes:
        disk.append(f"{_size(p.download_bytes)} to download")
    if p.convert:
        disk.append(f"{_size(p.disk_bytes)} for the flash folder")
    lines.append(f"disk         {' and '.join(disk) or 'nothing more'}")
    lines.append(
        f"flash        {_between(p.bytes_per_token, 1e-6, 1)} MB read per token; "
        f"{p.waits_per_token} waits for MLX"
    )
    lines += _speed(p)
    lines += [f"assumed      {line}" for line in p.assumed]
    if p.slow:
        lines += ["", f"This will be slow, because {p.slow}"]
    if p.convert:
        target = p.model.rstrip("/").split("/")[-1]
        lines += ["", f"Next: mlx-flash convert {p.model} -o {target}-flash"]
    return "\n".join(lines)


def _speed(p: Plan) -> list[str]:
    if p.tokens_per_s is None or p.ms_per_token is None or p.ms_of_slowest is None:
        return [
            "speed        not known: this machine has no profile yet. Make one: "
            "mlx-flash probe"
        ]
    assert p.prompt_s is not None and p.prompt_bytes is not None
    worst = _sum(p.ms_of_slowest)
    return [
        f"speed        {_between(p.tokens_per_s, 1, 2)} tokens/s, modelled "
        f"({_between(p.ms_per_token, 1, 1)} ms per token; at worst {worst})",
        f"first token  after about {p.first_token_s:,.1f} s with a prompt of "
        f"{p.prompt_tokens} tokens, {p.load_s:,.1f} s of it loading, modelled",
        f"prompt       {p.prompt_tokens_per_s:,.1f} tokens/s, "
        f"{p.prompt_bytes / 1e6:,.1f} MB read, {sum(p.prompt_s.values()):,.1f} s = "
        f"{_sum(p.prompt_s)}, modelled",
        f"machine      {p.machine}"
        + ("" if p.cold else "; flash figures not surely cold"),
    ]


def several_text(one: Plan, s: Several) -> str:
    """Several machines beside one, in the lines of a small table."""
    shares = ":".join(map(str, s.shares))
    rows = [
        ("", "1 machine", f"{s.machines} machines"),
        ("in memory", f"{one.held_share:.0%}", f"{s.held_share:.0%}"),
        (
            "MB read by each",
            _between(one.bytes_per_token, 1e-6, 1),
            _between(s.bytes_per_token, 1e-6, 1),
        ),
        (
            "sums per token",
            "–",
            f"{s.sums_per_token} of {s.bytes_per_sum / 1e3:.1f} KB",
        ),
        ("ms in sums", "–", f"{s.sum_ms:,.1f} + {s.call_ms:,.1f} to agree"),
    ]
    if one.ms_per_token and one.tokens_per_s and s.ms_per_token and s.tokens_per_s:
        rows += [
            (
                "ms per token",
                _between(one.ms_per_token, 1, 1),
                _between(s.ms_per_token, 1, 1),
            ),
            (
                "tokens/s",
                _between(one.tokens_per_s, 1, 2),
                _between(s.tokens_per_s, 1, 2),
            ),
        ]
    lines = [
        f"{s.machines} machines like this one, shares {shares}, "
        f"{_size(s.memory_bytes)} on each (the least is {_size(s.least_bytes)}); "
        "modelled, nothing of it was measured:",
        *(f"{name:<16}{alone:>18}{many:>28}".rstrip() for name, alone, many in rows),
        *(f"assumed      {line}" for line in s.assumed),
    ]
    return "\n".join(lines)


def _sum(parts: dict[str, float]) -> str:
    return " + ".join(f"{value:,.1f} {name}" for name, value in parts.items())


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.1f} MB"


def _between(pair: tuple[float, float], scale: float, digits: int) -> str:
    low, high = (f"{value * scale:,.{digits}f}" for value in pair)
    return low if low == high else f"{low} to {high}"


def profile_text(profile: Profile) -> str:
    """A profile as a table of reads and lines of figures."""
    counts = sorted({p.threads for p in profile.flash})
    speeds = {(p.block_bytes, p.threads): p.bytes_per_s for p in profile.flash}
    lines = [
        f"{profile.device}, {profile.os}",
        "",
        "random reads, GB/s" + "".join(f"{f'{n} at once':>12}" for n in counts),
    ]
    for block in sorted({p.block_bytes for p in profile.flash}):
        cells = (speeds.get((block, n)) for n in counts)
        row = "".join(f"{'' if s is None else f'{s / 1e9:.3f}':>12}" for s in cells)
        lines.append(f"{f'{block // 1024:,} KiB':>18}{row}")
    for point in profile.buffered:
        lines.append(
            f"{f'{point.block_bytes // 1024:,} KiB':>18} through the page cache, "
            f"{point.threads} at once: {point.cold_bytes_per_s / 1e9:.3f} cold, "
            f"{point.warm_bytes_per_s / 1e9:.3f} warm"
        )
    lines += [
        "",
        f"in order       {profile.sequential_bytes_per_s / 1e9:8.2f} GB/s",
        f"memory copy    {profile.memory_bytes_per_s / 1e9:8.1f} GB/s",
        f"a wait for MLX {profile.wait_s * 1e6:8.0f} µs, an operation "
        f"{profile.launch_s * 1e6:.1f} µs",
    ]
    for rate in profile.rates:
        if rate.kernel == "matmul":
            kind = f"{rate.bits} bits, {rate.dtype}" if rate.bits else rate.dtype
            lines.append(
                f"{kind:<18} {rate.bytes_per_s / 1e9:8.3f} GB/s of weights for a "
                f"token, {rate.flops_per_s / 1e9:,.1f} GFLOP/s for a prompt"
            )
    if profile.notes:
        lines += ["", "Not surely cold: " + "; ".join(profile.notes) + "."]
    return "\n".join(lines)
