"""The layers: who may import whom. Read from the sources with ast, so that imports inside of functions count too."""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"kernels": "torchinfer.kernels", "serving": "torchinfer.serving", "torchinfer": "torchinfer"}

# Where a toolchain may be imported: a module, or a package with all that is in it.
HOMES = {
    "torch_xla": (
        "torchinfer.device",
        "torchinfer.kernels.tpu",
        "torchinfer.planner.trace",
        "torchinfer.spmd",
        "torchinfer.xla_program",
    ),
    "torchax": ("torchinfer.kernels.tpu",),
    "jax": ("torchinfer.kernels.tpu", "torchinfer.aot", "torchinfer.aot_compiler", "torchinfer.kernel_calls"),
    "jaxlib": ("torchinfer.kernels.tpu", "torchinfer.aot", "torchinfer.aot_compiler"),
    "libtpu": (),
    "triton": ("torchinfer.kernels.cuda",),
    "ctypes": ("torchinfer.kernels.cpu", "torchinfer.loader.memory"),
    "grpc": ("torchinfer.serving",),
    "google": ("torchinfer.serving",),
    "google_crc32c": ("torchinfer.fake_gcs_objects", "torchinfer.loader.checksum"),
    "gcsfs": ("torchinfer.loader.gcs",),
    "fsspec": (),
    "lm_eval": ("torchinfer.evaluation.harness", "torchinfer.evaluation.lm_eval"),
    "transformers": ("torchinfer.tokenizer", "torchinfer.testing"),
}
WITHOUT_TORCH = (
    "torchinfer.aot",
    "torchinfer.aot_compiler",
    "torchinfer.async_engine",
    "torchinfer.attention_bundles",
    "torchinfer.config",
    "torchinfer.control_groups",
    "torchinfer.engine_info",
    "torchinfer.engine_loop",
    "torchinfer.errors",
    "torchinfer.evaluation.options",
    "torchinfer.hbm_traffic",
    "torchinfer.hosts",
    "torchinfer.kernel_calls",
    "torchinfer.kv_cache.pages",
    "torchinfer.kv_cache.prefix",
    "torchinfer.lazy",
    "torchinfer.link",
    "torchinfer.loader.folder",
    "torchinfer.loader.gcs",
    "torchinfer.loader.gcs_stream",
    "torchinfer.loader.mount",
    "torchinfer.loader.retry",
    "torchinfer.loader.source",
    "torchinfer.loader.stall",
    "torchinfer.loader.storage",
    "torchinfer.logit_edits",
    "torchinfer.planner.accelerators",
    "torchinfer.planner.options",
    "torchinfer.planner.prices",
    "torchinfer.request",
    "torchinfer.scheduler",
    "torchinfer.sequence",
    "torchinfer.tokenizer",
    "torchinfer.tokenizer_files",
)
BACKENDS = (
    "torchinfer.kernels.reference",
    "torchinfer.kernels.cpu",
    "torchinfer.kernels.tpu",
    "torchinfer.kernels.cuda",
)

# Top to bottom: a module imports from its own line and from those below it, never from above.
LAYERS = (
    ("torchinfer.cli",),
    ("torchinfer.cli_flags",),
    ("torchinfer.console",),
    ("torchinfer.serving",),
    ("torchinfer.planner.table", "torchinfer.planner.chart"),
    ("torchinfer.planner.compiled",),
    ("torchinfer.planner.kernels",),
    ("torchinfer.planner.planner",),
    ("torchinfer.evaluation.report",),
    ("torchinfer.evaluation.plot", "torchinfer.evaluation.table"),
    ("torchinfer.evaluation.lm_eval", "torchinfer.evaluation.evaluate"),
    ("torchinfer.evaluation.harness", "torchinfer.evaluation.inputs", "torchinfer.evaluation.driver"),
    ("torchinfer.evaluation.metrics", "torchinfer.evaluation.passes", "torchinfer.evaluation.store"),
    ("torchinfer.evaluation.variants", "torchinfer.evaluation.windows"),
    ("torchinfer.llm", "torchinfer.async_engine"),
    ("torchinfer.engine_loop", "torchinfer.rank_process"),
    ("torchinfer.launch",),
    ("torchinfer.planner.roofline", "torchinfer.planner.capacity"),
    ("torchinfer.planner.trace",),
    ("torchinfer.planner.footprint",),
    ("torchinfer.planner.source",),
    ("torchinfer.startup",),
    ("torchinfer.ranks",),
    ("torchinfer.lockstep",),
    ("torchinfer.engine",),
    ("torchinfer.spmd_runner",),
    ("torchinfer.xla_runner", "torchinfer.fake_runner", "torchinfer.fake_gcs", "torchinfer.testing"),
    ("torchinfer.runner", "torchinfer.spmd_step"),
    ("torchinfer.decode_graphs", "torchinfer.step_memory"),
    ("torchinfer.step_input",),
    ("torchinfer.logit_edits", "torchinfer.scheduler", "torchinfer.output", "torchinfer.sampler"),
    ("torchinfer.writer",),
    ("torchinfer.calibration",),
    ("torchinfer.tokenizer_files",),
    ("torchinfer.loader", "torchinfer.sequence", "torchinfer.kv_cache.tensors"),
    ("torchinfer.kv_cache.pages", "torchinfer.kv_cache.prefix", "torchinfer.tokenizer"),
    ("torchinfer.spmd_matrices",),
    ("torchinfer.parallel",),
    ("torchinfer.models",),
    ("torchinfer.quantization",),
    ("torchinfer.kernels",),
    BACKENDS,
    ("torchinfer.engine_info", "torchinfer.layer_parts"),
    ("torchinfer.fake_gcs_objects",),
    ("torchinfer.evaluation.options", "torchinfer.planner.options"),
    ("torchinfer.attention_bundles", "torchinfer.kernel_calls"),
    ("torchinfer.aot", "torchinfer.aot_compiler", "torchinfer.hbm_traffic"),
    ("torchinfer.xla_program",),
    ("torchinfer.batch", "torchinfer.config", "torchinfer.device", "torchinfer.flags", "torchinfer.request"),
    ("torchinfer.spmd",),
    ("torchinfer.hosts",),
    ("torchinfer.link",),
    (
        "torchinfer.control_groups",
        "torchinfer.errors",
        "torchinfer.evaluation",
        "torchinfer.kv_cache",
        "torchinfer.lazy",
        "torchinfer.planner",
        "torchinfer.planner.accelerators",
        "torchinfer.planner.prices",
        "torchinfer.quantized_weight",
        "torchinfer.weight_map",
    ),
)


@dataclass(frozen=True)
class Import:
    """One import statement's module, `of` the module that has it."""

    of: str
    module: str
    is_typing_only: bool


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *(part for part in rest if part != "__init__")])


def source_files() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


MODULES = {module_name(path): path for path in source_files()}


def imports_of(module: str) -> Iterator[Import]:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    guarded = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module, alias.name, id(node) in guarded)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield Import(module, full if full in MODULES else str(node.module), id(node) in guarded)


ALL_IMPORTS = [found for module in MODULES for found in imports_of(module)]


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def layer_of(module: str) -> int:
    """Index of the line with the longest name that holds the module."""
    fitting = [(len(name), level) for level, names in enumerate(LAYERS) for name in names if is_in(module, (name,))]
    assert fitting, f"{module} has no layer: put it into LAYERS"
    return max(fitting)[1]


def toolchains_abroad(imports: list[Import]) -> list[Import]:
    def is_abroad(found: Import) -> bool:
        homes = HOMES.get(found.module.partition(".")[0])
        return homes is not None and not is_in(found.of, homes)

    return [found for found in imports if is_abroad(found)]


def torch_where_it_is_not_needed(imports: list[Import]) -> list[Import]:
    return [found for found in imports if found.of in WITHOUT_TORCH and is_in(found.module, ("torch",))]


def imports_of_the_library_by_backends(imports: list[Import]) -> list[Import]:
    def is_allowed(found: Import) -> bool:
        backend = next(name for name in BACKENDS if is_in(found.of, (name,)))
        plain = ("torchinfer.batch", "torchinfer.layer_parts", "torchinfer.quantized_weight")
        if found.is_typing_only and found.module in plain:
            return True
        if found.module == "torchinfer.control_groups":  # facts about the machine, without imports of its own
            return True
        # A port may build upon the reference, never upon another port.
        return not is_in(found.module, ("torchinfer",)) or is_in(
            found.module, (backend, "torchinfer.kernels.reference")
        )

    return [found for found in imports if is_in(found.of, BACKENDS) and not is_allowed(found)]


def backends_past_the_door(imports: list[Import]) -> list[Import]:
    return [found for found in imports if is_in(found.module, BACKENDS) and not is_in(found.of, BACKENDS)]


def upward(imports: list[Import]) -> list[Import]:
    return [
        found
        for found in imports
        if found.of != "torchinfer" and is_in(found.module, ("torchinfer",)) and is_upward(found.of, found.module)
    ]


def is_upward(of: str, module: str) -> bool:
    # The package's own __init__ lists names from everywhere, so that importing from it goes up from anywhere.
    return module == "torchinfer" or layer_of(module) < layer_of(of)


# Each rule, with imports that break it.
RULES = {
    toolchains_abroad: [
        ("torchinfer.runner", "torch_xla.core.xla_model"),
        ("torchinfer.device", "jax"),
        ("torchinfer.kernels.tpu.paged_attention", "triton.language"),
        ("torchinfer.cli", "grpc"),
        ("torchinfer.models.llama", "transformers"),
        ("torchinfer.loader.storage", "gcsfs"),
    ],
    torch_where_it_is_not_needed: [("torchinfer.scheduler", "torch"), ("torchinfer.kv_cache.pages", "torch.nn")],
    imports_of_the_library_by_backends: [
        ("torchinfer.kernels.reference.rms_norm", "torchinfer.config"),
        ("torchinfer.kernels.reference.paged_attention", "torchinfer.batch"),
        ("torchinfer.kernels.reference.paged_attention", "torchinfer.kernels.tpu.paged_attention"),
    ],
    backends_past_the_door: [("torchinfer.models.layers", "torchinfer.kernels.reference.rms_norm")],
    upward: [
        ("torchinfer.engine", "torchinfer.serving.convert"),
        ("torchinfer.scheduler", "torchinfer.runner"),
        ("torchinfer.runner", "torchinfer"),
        ("torchinfer.errors", "torchinfer.request"),
    ],
}
BROKEN = [(rule, of, module) for rule, examples in RULES.items() for of, module in examples]
Rule = Callable[[list[Import]], list[Import]]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_import_breaks_the_rule(rule: Rule):
    assert rule(ALL_IMPORTS) == []


@pytest.mark.parametrize(("rule", "of", "module"), BROKEN)
def test_the_rule_finds_an_import_that_breaks_it(rule: Rule, of: str, module: str):
    broken = Import(of, module, is_typing_only=False)
    assert rule([*ALL_IMPORTS, broken]) == [broken]


def test_typing_is_no_excuse_for_going_up():
    broken = Import("torchinfer.batch", "torchinfer.engine", is_typing_only=True)
    assert upward([broken]) == [broken]


def test_the_names_in_the_rules_are_there():
    named = {name for names in LAYERS for name in names} | set(WITHOUT_TORCH)
    assert {name for name in named - set(MODULES) if name not in BACKENDS} == set()


def test_imports_are_read_at_all():
    assert Import("torchinfer.batch", "torch", is_typing_only=False) in ALL_IMPORTS
    assert any(found.is_typing_only for found in ALL_IMPORTS)


def test_the_folder_of_kernels_is_no_package_of_its_own():
    # With __init__.py it would be found in place of Hugging Face's `kernels`, wherever Python starts in the repository.
    assert not (ROOT / "kernels" / "__init__.py").exists()
