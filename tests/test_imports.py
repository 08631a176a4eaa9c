"""Who may import whom, and how large files and functions may grow."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = sorted(
    [*ROOT.glob("minisd/**/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "train.py", ROOT / "sample.py"]
)

# Lowest first: a file imports from its own line or from the lines above it, never from those below.
LAYERS = [
    [
        "minisd",
        "minisd.kernels",
        "minisd.registry",
        "minisd.options",
        "minisd.presets",
        "minisd.noise",
        "minisd.files",
        "minisd.terminal",
        "minisd.graph",
    ],
    ["minisd.ops"],
    ["minisd.device"],
    ["minisd.models"],
    ["minisd.formats", "minisd.schedulers", "minisd.data"],
    ["minisd.adapters"],
    ["minisd.sampling"],
    ["minisd.methods"],
    ["minisd.training"],
    ["minisd.cli", "minisd.keywords"],
    ["minisd.page"],
    ["minisd.__main__", "minisd.testing", "minisd.tiny", "minisd.score"],
    ["train", "sample"],
]


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return "minisd." + name if name.startswith("kernels.") else name


def layer(module: str) -> int:
    parts = module.split(".")
    for end in range(len(parts), 0, -1):
        for level, names in enumerate(LAYERS):
            if ".".join(parts[:end]) in names:
                return level
    raise AssertionError(f"{module} is in no layer: add it to LAYERS")


def imported(path: Path) -> set[str]:
    """What a file imports when it runs, at its top or in a function; `if TYPE_CHECKING:` never runs."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_down(path):
    own = module_of(path)
    for name in imported(path):
        if (
            name == "minisd" or not name.startswith("minisd.") or own == "minisd"
        ):  # which offers names, lazily
            continue
        if own.startswith("minisd.kernels."):
            assert name.startswith("minisd.kernels."), (
                f"{own} imports {name}: kernels know torch and triton only"
            )
        assert layer(name) <= layer(own), f"{own} imports {name} from above"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_oracles_are_never_imported(path):
    roots = {name.partition(".")[0] for name in imported(path)}
    assert not roots & {"diffusers", "accelerate", "peft", "k_diffusion"}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_one_file_one_subject(path):
    assert len(path.read_text().splitlines()) <= 400


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match, ast.FunctionDef, ast.ClassDef)


def depth(node: ast.AST) -> int:
    """How deep blocks are nested within a node; an `elif` is on the level of its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        elif_ = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child) + (isinstance(child, BLOCKS) and not elif_))
    return deepest


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_functions_are_short_and_flat(path):
    """At most 60 lines, decorators not counted, and four levels of blocks."""
    for function in functions(path):
        lines = function.end_lineno - function.lineno + 1
        assert lines <= 60, f"{function.name} has {lines} lines"
        assert depth(function) <= 4, f"{function.name} is nested {depth(function)} deep"


def test_depth():
    code = """if True:
    def f():
        for x in ():
            if x == 1:
                pass
            elif x == 2:
                with x:
                    pass
            else:
                if x == 3:
                    pass
                x = 1
    """
    assert depth(ast.parse(code).body[0].body[0]) == 3


def test_a_loop_of_links_is_no_runtime_error():
    """As it is in Path.resolve before Python 3.13: what a user names goes through reading.real."""
    resolving = [f"{module_of(p)}: {line}" for p in SOURCES for line in p.read_text().splitlines()
                 if ".resolve()" in line and "__file__" not in line]  # fmt: skip
    assert not resolving


def test_transformers_is_imported_in_one_place():
    """And not to draw a picture: it takes longer than that."""
    users = [module_of(p) for p in SOURCES if any(n.startswith("transformers") for n in imported(p))]
    assert users == ["minisd.formats.hub", "minisd.models.tokenizer"]
    code = (
        "import sys; from minisd import options; from minisd.sampling import stable_diffusion as s; "
        "print(s.StableDiffusion.load(options.TINY).tokenizer.encode('cat'), 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("] False\n"), done.stdout + done.stderr


def test_what_is_imported_is_declared():
    """By the project or one of its extras; what those of an extra bring along counts as declared by it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = {
        re.match(r"[\w-]+", line)[0] for lines in [project["dependencies"], *extras] for line in lines
    }
    names = {"PIL": "pillow", "pillow_heif": "pillow-heif", "resvg_py": "resvg-py", "starlette": "gradio"}
    found = {name.partition(".")[0] for path in SOURCES for name in imported(path)}
    others = found - {"minisd"} - sys.stdlib_module_names
    assert len(others) > 10 and {names.get(name, name) for name in others} <= declared
    needed = {
        name.partition(".")[0] for path in SOURCES if path.parts[-2] != "tiny" for name in imported(path)
    }
    assert {"tokenizers", "huggingface_hub"} <= needed


HEAVY = "torch numpy transformers PIL triton safetensors tqdm huggingface_hub"


@pytest.mark.parametrize(
    "flags", ["--help", "--method textual_inversion --help", "--method textual_inversion --x"]
)
def test_help_imports_nothing_heavy(flags):
    code = (
        f"import sys, atexit; sys.argv = ['train.py'] + {flags.split()!r}\n"
        f"atexit.register(lambda: print('LOADED', sorted(set(sys.modules) & set({HEAVY.split()!r}))))\n"
        "import runpy; runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "LOADED []" in done.stdout, done.stdout + done.stderr
