"""mergekit's twenty method names, their parameters, and the steps that do the same here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_merge.errors import UserError, nearest, unknown
from lightning_merge.mergekit.parameters import Parameter
from lightning_merge.methods.arcee_fusion import ArceeFusion
from lightning_merge.methods.average import WeightedAverage
from lightning_merge.methods.base import MergeMethod, Transform
from lightning_merge.methods.breadcrumbs import Breadcrumbs
from lightning_merge.methods.dare import Dare
from lightning_merge.methods.della import Della
from lightning_merge.methods.karcher import Karcher
from lightning_merge.methods.model_stock import ModelStock
from lightning_merge.methods.multislerp import MultiSlerp
from lightning_merge.methods.nearswap import NearSwap
from lightning_merge.methods.nuslerp import NuSlerp
from lightning_merge.methods.passthrough import Passthrough
from lightning_merge.methods.ram import Ram
from lightning_merge.methods.ram_plus import RamPlus
from lightning_merge.methods.sce import Sce
from lightning_merge.methods.slerp import Slerp
from lightning_merge.methods.task_arithmetic import TaskArithmetic
from lightning_merge.methods.ties import Ties

Steps = tuple[MergeMethod, tuple[Transform, ...]]


@dataclass(frozen=True)
class Settings:
    """The parameters of one tensor.

    Attributes:
        shared: Values that hold for the tensor.
        by_model: Values of each model that is not the base (of all models where the method ignores the base).
    """

    shared: Mapping[str, Any]
    by_model: Mapping[str, Mapping[str, Any]]


Build = Callable[[Settings], Steps]


@dataclass(frozen=True)
class MethodSpec:
    """One of mergekit's methods.

    Attributes:
        name: Its name in recipes.
        parameters: What a recipe may set.
        build: Makes our steps from the settings of a tensor.
        base: Whether it merges task vectors over a base, may do so, or takes the base for an ordinary input.
        inputs: The least and the largest number of models, base included.
        others: The least and the largest number of models that are not the base.
    """

    name: str
    parameters: tuple[Parameter, ...]
    build: Build
    base: Literal["required", "optional", "ignored"] = "required"
    inputs: tuple[int, int | None] = (1, None)
    others: tuple[int, int | None] = (0, None)

    def check_inputs(self, models: Sequence[str], base: str | None, where: str) -> None:
        """Check the models of a slice from their names.

        Raises:
            UserError: The base is missing, or there are too few or too many models.
        """
        if self.base == "required" and base is None:
            raise UserError(f"{self.name} needs a base_model, and {where} has none. Expected base_model: MODEL.")
        if self.base != "ignored" and base is not None and base not in models:
            raise UserError(
                f"The base_model '{base}' is none of the sources of {where} ({', '.join(models)}). "
                "Expected it among them."
            )
        merged = [model for model in models if self.base == "ignored" or model != base]
        for count, (least, most), what in (
            (len(models), self.inputs, "models, the base included"),
            (len(merged), self.others, "models beside the base"),
        ):
            if count < least or (most is not None and count > most):
                bound = f"at least {least}" if count < least else f"up to {most}"
                wanted = f"exactly {least}" if least == most else bound
                raise UserError(f"{self.name} takes {wanted} {what}; {where} has {count} ({', '.join(models)}).")


def method_spec(name: str) -> MethodSpec:
    """Return one of mergekit's methods by its name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in METHODS:
        raise unknown("merge_method", name, METHODS)
    return METHODS[name]


def known_parameters() -> set[str]:
    """Return the names of all parameters that some method has."""
    return {parameter.name for spec in METHODS.values() for parameter in spec.parameters}


def check_parameter_name(spec: MethodSpec, name: str, where: str) -> bool:
    """Tell whether the method has a parameter of this name.

    Raises:
        UserError: No method has.
    """
    own = {parameter.name for parameter in spec.parameters}
    if name in own:
        return True
    if name not in known_parameters():
        hint = nearest(name, own) or nearest(name, known_parameters())
        listed = ", ".join(sorted(own)) or "none"
        raise UserError(f"{where}: unknown parameter '{name}'. Parameters of {spec.name}: {listed}.{hint}")
    return False


# --- our steps -------------------------------------------------------------------------------------------------------


def _uniform(values: Mapping[str, Any]) -> Any:
    """Return the one value of all models, where they agree, else the values by model."""
    distinct = set(values.values())
    return distinct.pop() if len(distinct) == 1 else dict(values)


def _linear(settings: Settings) -> Steps:
    weights = settings.by_model["weight"]
    return WeightedAverage(weights=dict(weights), normalize=settings.shared["normalize"], compat="mergekit"), ()


def _slerp(settings: Settings) -> Steps:
    return Slerp(t=settings.shared["t"], compat="mergekit"), ()


def _nuslerp(settings: Settings) -> Steps:
    along: Literal["tensor", "row", "column"] = "tensor"
    if not settings.shared["nuslerp_flatten"]:
        along = "column" if settings.shared["nuslerp_row_wise"] else "row"  # so their words mean
    return NuSlerp(weights=dict(settings.by_model["weight"]), along=along, compat="mergekit"), ()


def _multislerp(settings: Settings) -> Steps:
    weights = dict(settings.by_model["weight"])
    return MultiSlerp(weights=weights, normalize=settings.shared["normalize_weights"]), ()


def _karcher(settings: Settings) -> Steps:
    shared = settings.shared
    return Karcher(max_iterations=shared["max_iter"], tolerance=shared["tol"], compat="mergekit"), ()


def _ties(settings: Settings, density: Any = 1.0, rescale: bool = False) -> MergeMethod:
    return Ties(
        density=density,
        scale=settings.shared["lambda"],
        operation="mean" if settings.shared["normalize"] else "sum",
        weights=_uniform(settings.by_model["weight"]),
        rescale=rescale,
        compat="mergekit",
    )


def _sum(settings: Settings) -> MergeMethod:
    return TaskArithmetic(
        scale=settings.shared["lambda"],
        weights=_uniform(settings.by_model["weight"]),
        normalize=settings.shared["normalize"],
        compat="mergekit",
    )


def _task_arithmetic(settings: Settings) -> Steps:
    return _sum(settings), ()


def _plain_ties(settings: Settings) -> Steps:
    return _ties(settings, _density(settings), settings.shared["rescale"]), ()


def _density(settings: Settings) -> Any:
    """The kept shares; beyond 1 everything is kept."""
    return _uniform({model: min(float(share), 1.0) for model, share in settings.by_model["density"].items()})


def _dare(settings: Settings) -> Dare:
    rates = {model: 1.0 - min(float(share), 1.0) for model, share in settings.by_model["density"].items()}
    return Dare(drop_rate=_uniform(rates), rescale=settings.shared["rescale"], compat="mergekit")


def _breadcrumbs(settings: Settings) -> Breadcrumbs:
    gamma = _uniform(settings.by_model["gamma"])
    return Breadcrumbs(_density(settings), gamma, rescale=settings.shared["rescale"], compat="mergekit")


def _della(settings: Settings) -> Della:
    epsilon = _uniform(settings.by_model["epsilon"])
    return Della(_density(settings), epsilon, rescale=settings.shared["rescale"], compat="mergekit")


def _thinned(thin: Callable[[Settings], Transform], merge: Callable[[Settings], MergeMethod]) -> Build:
    """A thinning of task vectors before a sum or an election."""
    return lambda settings: (merge(settings), (thin(settings),))


def _sce(settings: Settings) -> Steps:
    return Sce(density=min(float(settings.shared["select_topk"]), 1.0), compat="mergekit"), ()


def _model_stock(settings: Settings) -> Steps:
    return ModelStock(clamp=False, per_row=settings.shared["filter_wise"], compat="mergekit"), ()


def _passthrough(settings: Settings) -> Steps:
    (scale,) = settings.by_model["scale"].values()
    return Passthrough(scale=1.0 if scale is None else scale), ()


def _nearswap(settings: Settings) -> Steps:
    return NearSwap(t=settings.shared["t"]), ()


def _arcee_fusion(settings: Settings) -> Steps:
    return ArceeFusion(), ()


def _ram(settings: Settings) -> Steps:
    return Ram(**settings.shared, compat="mergekit"), ()


def _ram_plus(settings: Settings) -> Steps:
    return RamPlus(**settings.shared, compat="mergekit"), ()


# --- the table -------------------------------------------------------------------------------------------------------

_WEIGHT = Parameter("weight", scope="non_base")
_T = Parameter("t")
_GAMMA = Parameter("gamma", scope="non_base", default=0.01)
_EPSILON = Parameter("epsilon", scope="non_base", default=0.15)
_INT8 = Parameter("int8_mask", bool, default=False, note="has no effect: it is about the memory that mergekit takes")
_NOTHING = "has no effect on task_arithmetic, here as in mergekit"


def _general(normalize: bool, rescale: bool, *more: Parameter) -> tuple[Parameter, ...]:
    """Parameters of the methods that mergekit builds on task arithmetic."""
    return (
        _WEIGHT,
        Parameter("density", scope="non_base", default=1.0),
        *more,
        Parameter("lambda", default=1.0),
        Parameter("normalize", bool, default=normalize),
        Parameter("rescale", bool, default=rescale),
        _INT8,
    )


_LINEAR = (Parameter("weight", scope="input"), Parameter("normalize", bool, default=True))
_NUSLERP = (
    _WEIGHT,
    Parameter("nuslerp_row_wise", bool, default=False),
    Parameter("nuslerp_flatten", bool, default=True),
)
_MULTISLERP = (
    _WEIGHT,
    Parameter("normalize_weights", bool, default=True),
    Parameter("eps", default=1e-8, note="has no effect: no constant is added to norms here"),
)
_TASK_ARITHMETIC = tuple(
    replace(parameter, note=_NOTHING) if parameter.name in ("density", "rescale") else parameter
    for parameter in _general(False, False)
)
_KARCHER = (Parameter("max_iter", int, default=10), Parameter("tol", default=1e-5))
_SCE = (_INT8, Parameter("select_topk", default=1.0))
_RAM_PLUS = (Parameter("r", default=0.1), Parameter("alpha", default=0.2), Parameter("epsilon", default=1e-5))
_SCALE = Parameter("scale", scope="input", default=None)

METHODS: dict[str, MethodSpec] = {
    spec.name: spec
    for spec in (
        MethodSpec("linear", _LINEAR, _linear, base="ignored"),
        MethodSpec("slerp", (_T,), _slerp, inputs=(2, 2)),
        MethodSpec("nuslerp", _NUSLERP, _nuslerp, base="optional", others=(2, 2)),
        MethodSpec("multislerp", _MULTISLERP, _multislerp, base="optional", others=(1, None)),
        MethodSpec("karcher", _KARCHER, _karcher, base="ignored"),
        MethodSpec("task_arithmetic", _TASK_ARITHMETIC, _task_arithmetic),
        MethodSpec("ties", _general(True, False), _plain_ties),
        MethodSpec("dare_linear", _general(False, True), _thinned(_dare, _sum)),
        MethodSpec("dare_ties", _general(False, True), _thinned(_dare, _ties)),
        MethodSpec("breadcrumbs", _general(False, False, _GAMMA), _thinned(_breadcrumbs, _sum)),
        MethodSpec("breadcrumbs_ties", _general(False, False, _GAMMA), _thinned(_breadcrumbs, _ties)),
        MethodSpec("della", _general(True, True, _EPSILON), _thinned(_della, _ties)),
        MethodSpec("della_linear", _general(False, True, _EPSILON), _thinned(_della, _sum)),
        MethodSpec("sce", _SCE, _sce),
        MethodSpec("model_stock", (Parameter("filter_wise", bool, default=False),), _model_stock, inputs=(3, None)),
        MethodSpec("nearswap", (_T,), _nearswap, inputs=(2, 2)),
        MethodSpec("arcee_fusion", (), _arcee_fusion, inputs=(2, 2)),
        MethodSpec("ram", (Parameter("epsilon", default=1e-5),), _ram),
        MethodSpec("ramplus_tl", _RAM_PLUS, _ram_plus),
        MethodSpec("passthrough", (_SCALE,), _passthrough, base="ignored", inputs=(1, 1)),
    )
}
