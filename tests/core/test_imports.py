"""What importing costs, and that the core knows no strategy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import robustkit

STRATEGIES = (
    "threats",
    "epsilons",
    "attacks",
    "objectives",
    "targets",
    "heads",
    "losses",
    "weights",
    "optimizers",
    "schedules",
)
CORE = Path(robustkit.__file__).parent / "core"


def loaded_after(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    return set(json.loads(done.stdout.splitlines()[-1]))


def core_modules() -> list[str]:
    return sorted(f"robustkit.core.{path.stem}" for path in CORE.glob("*.py") if path.stem != "__init__")


def test_the_core_imports_no_strategy() -> None:
    names = core_modules()
    assert {"robustkit.core.loop", "robustkit.core.recipe", "robustkit.core.override"} <= set(names)
    loaded = loaded_after("".join(f"import {name}\n" for name in names))
    assert set(names) <= loaded
    for package in STRATEGIES:
        assert not [name for name in loaded if name.startswith(f"robustkit.{package}")], package
    ours = {name for name in loaded if name.startswith("robustkit.") and not name.startswith("robustkit.core")}
    assert {name.split(".")[1] for name in ours} <= {"engine", "data", "functional"}
    assert not {name for name in loaded if name.startswith(("robustkit.evaluation", "robustkit.cli", "robustkit.runs"))}


def test_no_core_file_names_a_strategy_package() -> None:
    """Neither at import nor inside a function: names go through registries."""
    for path in CORE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for package in STRATEGIES:
            assert f"import robustkit.{package}" not in text and f"from robustkit.{package}" not in text, path.name


def test_importing_robustkit_and_the_registry_is_cheap() -> None:
    for code in (
        "import robustkit",
        "import robustkit.core.registry",
        "from robustkit.core.registry import registry\nregistry('attack').names()",
        "from robustkit.core.registry import entries\nassert len(list(entries('attack')))",
    ):
        loaded = loaded_after(code)
        heavy = {"torch", "numpy", "timm", "torchvision", "accelerate", "sklearn", "matplotlib", "rich"} & loaded
        assert heavy == set(), code


def test_public_names_load_when_used() -> None:
    loaded_after("import robustkit\nfor name in robustkit.__all__: assert getattr(robustkit, name) is not None")
    assert set(robustkit.__all__) <= {*dir(robustkit), *robustkit._HOMES}
    loaded_after(
        "try:\n    import robustkit; robustkit.nothing\nexcept AttributeError as error:\n"
        "    assert 'nothing' in str(error)\nelse:\n    raise SystemExit(1)"
    )


def test_one_strategy_does_not_drag_in_the_others() -> None:
    loaded = loaded_after("from robustkit.core.registry import registry\nregistry('schedule').get('one-cycle')")
    assert "robustkit.schedules.one_cycle" in loaded
    assert not [name for name in loaded if name.startswith(("robustkit.targets", "robustkit.evaluation", "timm"))]
