"""The commands, from anywhere: `minisd train`, `python -m minisd train`, `torchrun -m minisd train`."""

import runpy
import sys
from pathlib import Path

from minisd import __version__, cli, terminal
from minisd.options import require
from minisd.sampling.options import Page

MODULES = {"bench": "minisd.kernels.bench", "judge": "minisd.tiny.judge", "score": "minisd.score"}
USAGE = """usage: minisd COMMAND [flags]

commands:
  train    train a model by one of several methods
  sample   generate images
  bench    measure the kernels beside PyTorch's
  judge    train the small model by every method, and measure what it learned
  score    score images by CLIP and DINO, against other images and prompts
  compare  write a page that shows runs side by side
  page     show a page in the browser to draw on, and to watch runs
  check    report on the data of a training command, and train nothing
  plan     report what memory a training command takes, and train nothing
  index    make an index of more images than a list should hold, to train from

minisd COMMAND --help lists the flags of a command, and minisd --version prints the version."""


def train(prog: str = "train.py", *further: str) -> int:
    """Train as the command line and `further` flags say, and return the exit status."""
    name, options = cli.parse_train([*sys.argv[1:], *further], prog)

    from minisd.training import loop
    from minisd.training.run_folder import RunFolder

    return loop.start(RunFolder(name, options))


def sample(prog: str = "sample.py") -> int:
    """Generate images as the command line says, print their paths, and return the exit status."""
    jobs = cli.parse_sample(sys.argv[1:], prog)

    from minisd.sampling import run

    print("\n".join(map(str, run.run(jobs))))
    return 0


def compare(prog: str = "minisd compare") -> int:
    """Write the page of several runs, print its path, and return the exit status."""
    parser = cli.Parser(prog, description="Write a page that shows runs side by side.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the --output_dir of a run")
    parser.add_argument("--output", type=Path, default="compare.html", help="(default: compare.html)")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace --output if it is there (default: no)"
    )
    o = parser.parse_args()
    require(o.overwrite or not o.output.exists(), f"--output {o.output} exists: --overwrite replaces it")

    from minisd import files
    from minisd.training import report

    runs = [report.RunData.read(path.expanduser()) for path in o.runs]
    files.write_text(o.output, report.page(runs, o.output.parent))
    print(o.output)
    return 0


def page(prog: str = "minisd page") -> int:
    """Show a page in the browser until Ctrl-C, and return the exit status."""
    options = page_options(sys.argv[1:], prog)

    from minisd import page

    page.serve(options)
    return 0


def page_options(argv: list[str], prog: str = "minisd page") -> Page:
    """The options of a command line. If they are wrong, exits with status 2 and one line."""
    known, rest, written = cli.config(cli.Parser(prog=prog, add_help=False, allow_abbrev=False), argv)
    about = "Show a page in the browser to draw on, and to watch runs. Flags are what it begins with."
    parser = cli.parser_of(Page, prog, about)
    values = parser.read_values(f"--config {known.config}: ", Page, written) | parser.read_own(rest, Page)
    return parser.build(Page, values, "sample")


def check(prog: str = "minisd check") -> int:
    """Report on the data of a training command, and return the exit status."""
    return train(prog, "--check_data")


def plan(prog: str = "minisd plan") -> int:
    """Report what memory a training command takes, and return the exit status."""
    return train(prog, "--plan")


def index(prog: str = "minisd index") -> int:
    """Make an index of images, print what is in it, and return the exit status."""
    parser = cli.Parser(prog, description="Make an index of images, to train from.", allow_abbrev=False)
    parser.add_argument(
        "source", metavar="SRC", help="folder, or URL of one, of .tar or .parquet files or images"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the index")
    parser.add_argument(
        "--lanes", type=int, help="a multiple of the number of processes that will train from it"
    )
    parser.add_argument(
        "--skip_bad_images", action="store_true", help="decode all, and leave out those that fail"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an index that is there (default: no)"
    )
    o = parser.parse_args()

    from minisd.data import index, indexed
    from minisd.data.source import Source

    require(o.lanes is None or 0 < o.lanes <= indexed.LANES, f"--lanes must be from 1 to {indexed.LANES}")
    out = o.out.expanduser()
    alone = indexed.is_index(out) and {path.name for path in out.iterdir()} <= {*indexed.FILES}
    free = not out.exists() or (o.overwrite and alone)
    require(free, f"{out} exists: --overwrite replaces it, if it is an index and has nothing else in it")
    records, skipped = index.make(o.source, out, o.lanes, o.skip_bad_images)
    print(Source(str(out), records, tuple(skipped)).summary())
    _, lanes, window = records.lanes
    print(f"  shards: {len(records.table.shards)}, in {lanes} lanes, {window} mixed at a time")
    return 0


def main() -> None:
    """Run the command that the first argument names."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    if name in MODULES:
        try:
            runpy.run_module(MODULES[name], run_name="__main__", alter_sys=True)
        except ModuleNotFoundError as e:  # there is no triton on Windows and macOS
            sys.exit(terminal.complain(f"minisd {name}", f"it needs the package {e.name}, which is missing"))
    elif command := {f.__name__: f for f in (train, sample, compare, page, check, plan, index)}.get(name):
        prog = f"minisd {name}"
        cli.run(prog, lambda: command(prog))
    elif name in ("-h", "--help", "--version"):
        cli.run("minisd", lambda: print(f"minisd {__version__}" if name == "--version" else USAGE))
    else:
        known = f"train, sample, {', '.join(MODULES)}, compare, page, check, plan, index"
        sys.exit(terminal.complain("minisd", f"no command {name}; there are {known}"))


if __name__ == "__main__":
    main()
