"""postformer bench: how fast it is here, beside others, and whether it has become slower."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from postformer.cli.console import FAILED_CHECK, Json, Quiet, finish


def bench(
    parts: Annotated[list[str] | None, typer.Argument(
        help="Some of kernels, lengths, training, decoding; default all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, to see that everything runs.")] = False,
    check: Annotated[bool, typer.Option(
        "--check", help="Fail where a ratio is over 15 % below the last that were kept.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep these ratios as the last.")] = False,
    last: Annotated[Path, typer.Option(help="The file of the last ratios.")] = Path("benchmarks/bench.json"),
    out: Annotated[Path, typer.Option(help="Directory for bench.json and the page.")] = Path("runs/bench"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    set_: Annotated[list[str] | None, typer.Option(
        "-s", "--set", metavar="PATH=VALUE",
        help="Change a size, e.g. -s 'lengths.recipes=[linear]' for all of linear time, or -s kernels.rounds=15.",
    )] = None,
    quiet: Quiet = False, json: Json = False,
) -> None:
    """Measure kernels, training steps and decoding against other people's code, and the machine's own floors."""
    from postformer.report import render
    from postformer.study.bench import PARTS, compare, configured, ratios, run_bench
    from postformer.study.bench import keep as write
    from postformer.study.bench import last as read
    from postformer.study.results import write as write_results

    config = configured(set_ or [], quick, device)
    kept = read(last, config.model_dump(mode="json")) if check else None
    chosen = parts or list(PARTS)

    def tell(what: str) -> None:
        if not quiet:
            print(f"  {what}", file=sys.stderr, flush=True)

    found = run_bench(config, chosen, command=shlex.join(["postformer", *sys.argv[1:]]), progress=tell)
    result: dict[str, Any] = {**found, "ratios": ratios(found)}
    if kept is not None:
        result["check"] = compare(result["ratios"], kept["ratios"])
    write_results(out, result, "bench.json")
    page = render(out)
    _print(result)
    print(f"report: {page}")
    failed = bool(found["failures"])
    if kept is not None:
        failed = _verdict(result["check"], kept, found) or failed
    if keep and failed:
        print(f"{last} is left as it was, since something failed", file=sys.stderr)
    elif keep:
        write(found, last)
        print(f"kept in {last}")
    finish({**result, "report": str(page)}, json)
    if failed:
        raise typer.Exit(FAILED_CHECK)


def _print(found: dict[str, Any]) -> None:
    """Every comparison on a line: our time, the others' over ours, the share of the floor, what ran."""
    for number, rates in found["rates"].items():
        print(f"{number} threads: matrix product {rates['gemm_flops_per_s'] / 1e9:.0f} GFLOP/s, "
              f"copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    for part in ("kernels", "training", "decoding"):
        for row in found.get(part) or []:
            name = row.get("case") or row["recipe"]
            where = f"{row['threads']} threads" if part == "kernels" else f"context {row['context']:,}" \
                if part == "decoding" else f"{row['tokens']:,} tokens"
            if "failed" in row:
                print(f"{part:<9} {name:<16} {where:<16} FAILED: {row['failed']}")
                continue
            ours, others = row["sides"]["ours"], []
            for side, about in row["sides"].items():
                if side in row["ratios"]:
                    others.append(f"{side} {row['ratios'][side]:.2f}x")
                elif side != "ours" and part != "kernels":
                    others.append(f"{side}: {about['absent']}")
            speed = f"{ours['tokens_per_s']:,.0f} tokens/s" if "tokens_per_s" in ours else \
                f"{1e3 * ours['min']:.2f} ms (median {1e3 * ours['median']:.2f})"
            floor = f", {row['share']:.0%} of the floor" if "share" in row else ""
            print(f"{part:<9} {name:<16} {where:<16} {speed}{floor}; {', '.join(others)}  [{ours['backend']}]")
    for row in found.get("lengths") or []:
        if "failed" in row:
            print(f"lengths   {row['recipe']:<16} FAILED: {row['failed']}")
            continue
        met = "" if row["limit"] is None else f", limit {row['limit']}" + \
            (" EXCEEDED" if row["exponent"] > row["limit"] else "")
        print(f"lengths   {row['recipe']:<16} exponent {row['exponent']:.3f}{met}; "
              f"of memory {row['kept_exponent']:.3f}")
    for peer, about in found["peers"].items():
        print(f"{peer}: {about}")


def _verdict(check: dict[str, Any], kept: dict[str, Any], found: dict[str, Any]) -> bool:
    """Says what `--check` found; whether it fails."""
    print(f"against {kept['taken']}: {check['compared']} ratios compared, {len(check['fallen'])} fell by over 15 %, "
          f"{len(check['risen'])} rose as much")
    machines = [e["environment"].get("processor") for e in (kept, found)]
    if machines[0] != machines[1]:
        print(f"the last were taken on another processor ({machines[0]}); ratios move from one to another")
    for name, (then, now) in check["fallen"].items():
        print(f"  FELL {name}: {then:.3g} -> {now:.3g} ({now / then - 1:.0%})")
    for name in check["gone"]:
        print(f"  not measured now: {name}")
    return bool(check["fallen"])
