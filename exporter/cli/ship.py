"""`pocket probe`, `pocket bundle` and `pocket verify`."""

from __future__ import annotations

from pathlib import Path

from exporter import artifact as artifacts
from exporter import bundle as bundles
from exporter import plugins
from exporter import probe as probing
from exporter.cli.screen import print_json, print_line, print_table, watch
from exporter.plugins import Job


def probe(
    folder: Path, phone: str, prompt_tokens: int, new_tokens: int, repeats: int, warmups: int, threads: int,
    as_json: bool,
) -> None:  # fmt: skip
    """Measure an artifact on a phone, after its outputs proved right there."""
    made = artifacts.load(folder)
    prompt = probing.prompt(made, prompt_tokens)
    job = Job(prompt, new_tokens, warmups, repeats, threads)
    with watch([f"probe on {phone}"]) as shown, shown.stage(f"probe on {phone}"):
        found = probing.measure(folder, plugins.phone(phone), job)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    print_line(f"{found.kind.upper()}: {found.target} on {found.machine_line}")
    print_table("Measurement", ("what", "p50", "p90", "95 % interval of p50", "n"), found.rows())


def bundle(exported: Path, output: Path, as_json: bool) -> None:
    """Make a bundle of an export."""
    manifest = bundles.make(exported, output)
    _print_manifest(manifest, output, as_json, "bundled")


def verify(folder: Path, as_json: bool) -> None:
    """Verify a bundle."""
    manifest = bundles.verify(folder)
    _print_manifest(manifest, folder, as_json, "verified")


def _print_manifest(manifest: bundles.Manifest, folder: Path, as_json: bool, verb: str) -> None:
    if as_json:
        print_json(manifest.model_dump(mode="json"))
        return
    size = sum(file.bytes for file in manifest.files.values())
    print_line(f"{verb} {folder}: {len(manifest.files)} files, {size:,} bytes, {manifest.digest}")
