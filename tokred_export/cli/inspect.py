"""tokred-export inspect"""

from __future__ import annotations

from pathlib import Path

import click

from tokred_export.cli import _console
from tokred_export.cli._options import shared_options


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@shared_options
def command(bundle: Path, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Show what is in a bundle, and check the hash of every file. Needs no torch."""
    from tokred_export.backends.common import read_engines
    from tokred_export.bundle import read_bundle, unlisted_files, verify_files
    from tokred_export.manifest import describe_reduction
    from tokred_export.runtime.runner import engine_folders

    _console.set_up(verbose, quiet)
    found = read_bundle(bundle)
    verify_files(found)
    manifest = found.manifest
    if as_json:
        _console.print_json(manifest)
        return
    source = manifest.provenance
    _console.out.print(
        f"{bundle}: {source.model_source}, weights {source.weights_sha256[:12]}, "
        f"built {source.created} by tokred-export {source.tool_version}\n"
        f"reduction: {describe_reduction(manifest.spec.reduction)}",
        markup=False,
    )
    _console.table(
        "Components",
        ["name", "tokens in", "tokens out", "sites", "max batch", "dtype", "logits", "file"],
        [
            [name, c.metadata.seq_len, c.metadata.length_out, len(c.metadata.sites),
             c.metadata.max_batch, c.metadata.dtype, c.metadata.logits, c.file]
            for name, c in manifest.components.items()
        ],
    )
    engines = []
    for backend in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
        for folder in engine_folders(found, backend):
            for info in read_engines(found.path / folder).values():
                size = f"{info.bytes / 1e6:.1f}"
                engines.append(
                    [folder, info.component, f"{info.layers} ({info.layers_from})", size]
                )
    _console.table("Engines", ["folder", "component", "layers", "MB"], engines)
    total = sum(record.bytes for record in manifest.files.values())
    _console.out.print(
        f"{len(manifest.files)} files, {total / 1e6:.1f} MB, all hashes as recorded", markup=False
    )
    others = [name for name in unlisted_files(found) if not name.startswith("reports/")]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        _console.err.print(
            f"warning: not of the bundle: {', '.join(others[:3])}{more}", markup=False
        )
