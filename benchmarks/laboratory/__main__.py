"""`make demo`, `tax`, `real`, `refusals`, `language`, `continual`: what a model forgets while it is taught."""

import argparse
import sys

from laboratory import continual, demo, language, real, refusals, tax
from laboratory.runs import Stopped

SETTINGS = {
    "demo": demo, "tax": tax, "real": real, "refusals": refusals, "language": language, "continual": continual
}  # fmt: skip


def progress(message: str, milestone: bool = True) -> None:
    """One line that is overwritten; where that is not possible, a line per milestone."""
    if sys.stdout.isatty():
        print(f"\r\033[K{message[:110]}", end="", flush=True)
    elif milestone and message:
        print(message, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="laboratory", description=__doc__)
    commands = parser.add_subparsers(dest="setting", required=True)
    for name, setting in SETTINGS.items():
        summary = (setting.__doc__ or "").split("\n")[0].split(": ", 1)[1]
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--workers", type=int, help="runs at a time (default: one a core, or 1 on cuda)")
        setting.options(command)
    options = parser.parse_args(arguments)
    try:
        SETTINGS[options.setting].main(options, progress)
    except (Stopped, ValueError, FloatingPointError, ImportError) as e:
        raise SystemExit(f"make {options.setting}: {e}") from None
    except KeyboardInterrupt:
        raise SystemExit("\ninterrupted; the same command goes on from there") from None


if __name__ == "__main__":
    main()
