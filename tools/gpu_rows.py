"""What tools/gpu_day.py measured, as lines."""

from __future__ import annotations

import re
from typing import Any


def print_report(report: dict[str, Any]) -> None:
    """The cases as lines."""
    machine = report["hardware"]
    print(f"{machine.get('gpu') or machine['cpu']}, torch {report['versions']['torch']}")
    for name, row in report["cases"].items():
        result = row.get("result", {})
        if "error" in row:
            last = row["error"].strip().splitlines()[-1:] or ["no reason given"]
            print(f"{name:<42} failed: {last[0][:100]}")
        elif "step_s" in result:
            _print_step(name, result)
        elif "out_of_memory" in result:
            print(f"{name:<42} out of memory: {result['out_of_memory'][:100]}")
        elif "step_off" in result:
            print(f"{name:<42} plan's memory: {result['ready_off']:+.1%} {result['step_off']:+.1%}")
        elif "share_of_synthetic" in result:
            share = result["share_of_synthetic"]
            print(f"{name:<42}{result['images_per_s']:8.0f} images/s, {share:.1%} of noise's")
        elif "products_flops_per_s" in result:
            _print_ceilings(name, result)
        elif "shapes" in result:
            _print_attention(name, result)
        elif "told" in result:
            _print_tests(name, result)
    for key, rows in report["summary"].items():
        for name, value in rows.items():
            print(f"{key:<20} {value:7.3f}  {name}")


def _print_step(name: str, result: dict[str, Any]) -> None:
    kernels, host = (
        "      -" if result[key] is None else f"{1e3 * result[key]:7.1f}"
        for key in ("kernels_s", "host_s")
    )
    told = f" (told {result['told']['images_per_s']:.0f})" if result.get("told") else ""
    mfu = "     -" if result.get("mfu") is None else f"{result['mfu']:6.1%}"
    print(
        f"{name:<42}{1e3 * result['step_s']['median']:9.1f} ms  kernels {kernels}  host {host}  "
        f"{result['images_per_s']:8.0f} images/s{told}  MFU {mfu}"
    )
    for what, why in result["not_measured"].items():
        print(f"    no {what}: {why.strip().splitlines()[-1][:90]}")
    for news in result["news"]:
        print(f"    {news[:110]}")


def _print_ceilings(name: str, result: dict[str, Any]) -> None:
    told = []
    for precision, peak in result["told_peak_flops_per_s"].items():
        rates = result["products_flops_per_s"].items()
        best = max(rate for what, rate in rates if what.startswith(f"{precision} "))
        of = f" of {peak / 1e12:,.0f} stated" if peak else ""
        told.append(f"{precision} {best / 1e12:,.4g}{of} TFLOP/s")
    told.append(f"copies {result['copy_bytes_per_s'] / 1e9:,.0f} GB/s")
    told.append(f"uploads {result['upload_bytes_per_s'] / 1e9:,.0f} GB/s")
    print(f"{name:<42} {', '.join(told)}")


def _print_attention(name: str, result: dict[str, Any]) -> None:
    print(f"{name:<42} the kernel that a training takes, {result['images']} images")
    for shape, timed in result["shapes"].items():
        backend = timed["backend"]
        rate = timed["flops_per_s"].get(backend)
        told = "" if rate is None else f" {timed['ms'][backend]:.3g} ms, {rate / 1e12:.4g} TFLOP/s"
        print(f"    {shape:<42} {backend}{told}")


def _print_tests(name: str, result: dict[str, Any]) -> None:
    told = result["told"].strip("= ")
    if found := re.match(r"(\d+)(?:/\d+)? tests? collected", told):
        told = f"{found[1]} collected, not run (--tiny)"
    print(f"{name:<42} {told}")
