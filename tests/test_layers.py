"""Each module imports from those below it, so that it can be read and changed without those above. Imports inside functions count, too."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = {"learned_optim": ROOT / "learned_optim", "learned_optim.integrations": ROOT / "integrations"}

# From the bottom. Modules of a line do not import each other.
LAYERS = """
kernels.native
config argument_types report speed kernels.replay
storage weights
features
sharding network
checks.parameters rule
checks.groups checks.state
checks
kernels inspection kernels.matrices
kernels.cpu kernels.reference kernels.gpu_replay kernels.gpu_passes
kernels.gpu
optimizer
learned_optim
meta_train.config meta_train.bar meta_train.distributed meta_train.process meta_train.twice
meta_train.logs meta_train.stopping meta_train.tasks
meta_train.families.sampling meta_train.unroll meta_train.augment
meta_train.families.text meta_train.families.dense meta_train.families.real meta_train.in_place
meta_train.families.images meta_train.families.hub meta_train.estimators
meta_train.families.drawn meta_train.families.fine_tuning meta_train.averaging meta_train.slots meta_train.evaluate
meta_train.families meta_train.checkpoint
meta_train.folder meta_train.handover meta_train.recipe
meta_train.loop
meta_train
meta_train.__main__ comparison demo evaluation integrations integrations.transformers
cli
"""
# A name of the package that is loaded when somebody asks for it.
EXCEPTIONS = {("learned_optim", "comparison")}


def modules() -> dict[str, Path]:
    """The package's modules and their files."""
    found = {}
    for package, folder in PLACES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def imported(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports anywhere."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names |= {inner if (inner := f"{source}.{alias.name}") in known else source for alias in node.names}
    return names & known.keys()


def short(module: str) -> str:
    return module.removeprefix("learned_optim.")


def test_each_module_imports_from_layers_below_it_alone() -> None:
    known = modules()
    layer = {name: number for number, line in enumerate(LAYERS.splitlines()) for name in line.split()}
    assert layer.keys() == {short(module) for module in known}, "LAYERS says where each module belongs"
    pairs = {(short(module), short(other)) for module, path in known.items() for other in imported(module, path, known)}
    assert pairs > {*EXCEPTIONS, ("cli", "demo"), ("network", "weights"), ("meta_train.unroll", "rule")}
    assert [f"{module} imports {other}" for module, other in sorted(pairs - EXCEPTIONS) if layer[other] >= layer[module]] == []
