"""Whether the memory helps: benchmarks of long texts, policies of what stays in context, quality beside cost."""

from __future__ import annotations

MODEL = "deltamem"  # what lm-evaluation-harness knows our model by


def register() -> None:
    """Make ``deltamem`` a model of lm-evaluation-harness, for ``lm_eval.simple_evaluate(model="deltamem", …)``.

    Nothing but lm_eval's table of names is imported; a second call changes nothing.

    Raises:
        ImportError: lm_eval is not installed; the message says the command that installs it.
    """
    from ..errors import MissingPackageError

    try:
        # Its table looks for the models that come with it only as long as it is empty: they have to be there first.
        import lm_eval.models  # noqa: F401
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise MissingPackageError(
            f"evaluation: needs the package lm_eval, which cannot be imported here ({error}); "
            "pip install 'deltamem-fast[eval]'"
        ) from error
    if MODEL not in model_registry:
        model_registry.register(MODEL, target="deltamem_fast.eval.harness:DeltaMemLM")
