"""What importing the package costs, and in which direction its files depend on one another."""

import ast
import subprocess
import sys
from pathlib import Path

import pecker_fast

PACKAGE = Path(pecker_fast.__file__).parent
LAYERS = [
    ["errors", "native", "step_hooks", "frozen_channels", "once", "seal", "memory_meter", "leftovers", "tensor_file"],
    ["git_lfs", "locks", "source_tree"],
    ["checkpoint", "blocks", "classes", "regions", "settings", "step_metrics", "pickle_machine"],
    ["prompt_text", "foreign_weights"],
    ["mask_config", "config_file", "data", "prompt_files", "torch_file"],
    ["config", "distributed", "scatter", "schedule", "manifest", "prompt_protocols"],
    ["written"],
    ["output_check"],
    ["output_folder"],
    ["ops", "maskable", "sampling", "metrics", "packing", "block_scores", "combine", "terms", "checkpoint_folders"],
    ["selection", "saliency", "functional", "objectives", "flops", "models", "draws", "crossovers"],
    ["weight_costs", "stop_rule", "mask_controls", "html_page", "pretrain_checkpoint", "detectors"],
    [
        "mask",
        "layers",
        "score_model",
        "pretrain",
        "attacks",
        "evaluation",
        "report_page",
        "flop_table",
        "concept_tables",
    ],
    ["concept_draws", "layout", "reconcile", "compiled_calls", "distill_ranks", "distill_losses", "salun_mask"],
    ["concept_evaluation", "distill_masks", "stopping"],
    ["iteration_flops", "arrangement", "memory_order", "step_parts"],
    ["flat_store"],
    ["synced_store"],
    ["active"],
    ["optim", "apply", "scoring", "delta"],
    ["refresh", "distill_parts", "distill_output", "distill_samples", "distill_updates", "distilled"],
    ["distill_checkpoint", "distill_state"],
    ["distiller", "trainer", "baselines"],
    ["digits_task", "report", "flags", "concepts", "memory_parts"],
    ["time_estimate"],
    ["memory_estimate", "demo", "data_flags", "delta_flags", "baseline_flags", "compare_flags", "convert_flags"],
    ["concept_flags"],
    ["distill_flags", "evaluate_flags", "compare"],
    ["commands", "parser"],
    ["cli"],
    ["__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def unit(module: str) -> str:
    return module.split(".")[1]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pecker_fast"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {unit(alias.name) for alias in node.names if alias.name.startswith("pecker_fast.")}
    return found & set(RANK)


def calls_backward(path: Path) -> bool:
    calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return any(isinstance(call, ast.Attribute) and call.attr == "backward" for call in calls)


def test_dependencies_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in RANK, f"{path.name} has no place in LAYERS"
        for other in imports(path) - {own}:
            assert RANK[other] < RANK[own], f"{own} must not import {other}"


def test_kernels_import_nothing_of_the_package():
    for path in (PACKAGE.parent / "kernels").glob("*.py"):
        assert not imports(path)


def test_only_these_files_loop_over_training_steps():
    loops = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if calls_backward(p)}
    assert loops == {"distill_updates.py", "pretrain.py", "baselines/trainer.py", "attacks/relearning.py"}


def test_the_import_loads_nothing_heavy():
    code = (
        "import torch, sys, pecker_fast;"
        "heavy = ('diffusers', 'transformers', 'triton', 'matplotlib', 'sklearn', 'scipy', 'pyarrow', 'PIL', 'peft',"
        "'pecker_fast._C', 'pecker_fast.concepts', 'pecker_fast.commands', 'pecker_fast.compare');"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_public_name_is_there_and_documented():
    for name in pecker_fast.__all__:
        assert getattr(pecker_fast, name).__doc__, name
