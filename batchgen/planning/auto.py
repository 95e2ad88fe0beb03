"""Which engine a run uses: the one that was named, or `auto`: the one that is forecast to be the fastest.

One process chooses, from what does not change from one start to the next: the model's config, a sample of the input's
lengths, the kind and number of GPUs. The choice is recorded with the attempt, and the other ranks read it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgen.engine import Engine, EngineError, Tokenizer
from batchgen.engines import check_dtype, list_settings, parse_options, settings_of
from batchgen.engines import find as find_engine
from batchgen.engines import names as engine_names
from batchgen.models import split_folder
from batchgen.models.footprint import AUTO as AUTO_CACHE
from batchgen.models.footprint import find_cache_format
from batchgen.packages import is_installed
from batchgen.planning.work import Work

if TYPE_CHECKING:
    from batchgen.planning.forecast import Forecast, Model
    from batchgen.planning.hardware import Nodes

AUTO = "auto"

# The lengths of an input's rows; read only where engines have to be compared.
Measure = Callable[[Tokenizer], Work]


@dataclass(frozen=True)
class Choice:
    """An engine and its settings."""

    name: str
    kind: type[Engine]
    options: Any = field(repr=False)
    why: str = ""  # it was chosen; "" if it was named

    def __str__(self) -> str:
        """The engine and its settings as they could have been typed."""
        usual = self.kind.Options()
        given = settings_of(self.options).items()
        changed = [f"--set {name}={value}" for name, value in given if value != getattr(usual, name)]
        return " ".join([self.name, *changed])


def choose_named(name: str, settings: Sequence[str], dtype: str) -> Choice:
    """The engine that was asked for.

    Raises:
        EngineError: there is none of that name, or it has no such setting or dtype.
    """
    kind = find_engine(name)
    check_dtype(kind, dtype)
    return Choice(name, kind, parse_options(kind, settings))


def read_recorded_choice(provenance: Mapping[str, Any]) -> Choice:
    """What the process that began the attempt has chosen, from what it has recorded."""
    kind = find_engine(str(provenance["engine"]))
    return Choice(
        str(provenance["engine"]), kind, kind.Options(**provenance["settings"]), str(provenance["engine_reason"])
    )


def choose_fastest(
    model: Path, dtype: str, settings: Sequence[str], measure: Measure, nodes: Nodes, *, by_row: bool = False
) -> Choice:
    """The engine that is forecast to be the fastest of those that fit. An engine that needs no model is none of them.

    Args:
        model: its folder.
        settings: `name=value`, which leave the engines that know all of these names.
        by_row: rows name adapters, which leaves the engines that take several.

    Raises:
        EngineError: none fits, or none knows the settings; the message says why of each, and what to do.
    """
    kinds = {name: kind for name in engine_names() if (kind := find_engine(name)).needs_model}
    split = split_folder.read(model)
    if split is not None:
        group_settings = {kind.group_setting for kind in kinds.values() if kind.group_setting is not None}
        if not group_settings & _names(settings):
            settings = [*(f"{name}={split.ranks}" for name in sorted(group_settings)), *settings]
    excluded = {
        name: why
        for name, kind in kinds.items()
        if (why := _why_not(kind, split.dtype if split else "", dtype, settings) or _why_not_by_row(kind, by_row))
    }
    if len(excluded) == len(kinds):
        raise EngineError(
            f"no engine can do this: {_grouped(excluded)}. Change the settings or --dtype; "
            "with an --engine, a wrong setting lists those it has"
        )
    candidates = {name: kind for name, kind in kinds.items() if name not in excluded}
    first, kind = next(iter(candidates.items()))
    if len(candidates) == 1 and not _has_groups_to_choose(kind, settings, nodes.ranks):
        return Choice(first, kind, parse_options(kind, settings), f"the only one left ({_grouped(excluded)})")
    search = _Search(kind.tokenizer(str(model)), dtype, settings, list(candidates), nodes)
    best, why = search.best(measure)
    why += f" (not asked: {_grouped(excluded)})" if excluded else ""
    if best is None:
        return Choice(first, kind, parse_options(kind, settings), why)
    options = parse_options(kinds[best.engine], (*best.placement.settings, *settings))
    return Choice(best.engine, kinds[best.engine], options, why)


def _why_not(kind: type[Engine], split: str, dtype: str, settings: Sequence[str]) -> str:
    """Why the engine cannot do this on any machine; "" if it can.

    Args:
        split: the type of files that are split by rank; "": they are not.
    """
    if split and split not in kind.reads_split:
        return "no use for files that are split by rank" + (f" in {split}" if kind.reads_split else "")
    unknown = [name for text in settings if (name := text.partition("=")[0]) not in list_settings(kind)]
    if unknown:
        return f"no setting {', '.join(unknown)}"
    if dtype not in kind.dtypes:
        return f"no dtype {dtype}"
    missing = [name for name in kind.packages(parse_options(kind, settings), dtype) if not is_installed(name)]
    return f"the package {missing[0]} is not installed" if missing else ""


def _has_groups_to_choose(kind: type[Engine], settings: Sequence[str], ranks: int) -> bool:
    """Whether ranks of the engine can share a model in groups of several sizes, and no setting says of which."""
    return ranks > 1 and kind.group_setting is not None and kind.group_setting not in _names(settings)


def _why_not_by_row(kind: type[Engine], by_row: bool) -> str:
    return "no adapters by row (--adapter FOLDER merges one)" if by_row and not kind.takes_adapters else ""


def _grouped(out: Mapping[str, str]) -> str:
    """Reasons, and the engines that each is of."""
    return "; ".join(f"{why}: {', '.join(n for n in out if out[n] == why)}" for why in dict.fromkeys(out.values()))


@dataclass(frozen=True)
class _Search:
    """Forecasts of several engines."""

    tokenizer: Any
    dtype: str
    given: Sequence[str]  # settings
    engines: Sequence[str]
    nodes: Nodes

    def best(self, measure: Measure) -> tuple[Forecast | None, str]:
        """The fastest that fits, and why it is that one; None: the settings ask for what none of them can be.

        Raises:
            EngineError: none fits.
        """
        from batchgen.planning.forecast import (  # imports torch, and a run whose engine is named may need none
            Model,
        )

        work = measure(self.tokenizer)
        if not work.lengths:
            work = Work([(1, 1)], 1)
        # All engines that are left know all settings that are given; who has none of these names has what is usual.
        options = parse_options(find_engine(self.engines[0]), self.given)
        cache = find_cache_format(getattr(options, "kv_dtype", AUTO_CACHE))
        group_size = getattr(options, "group_size", None) or 0
        model = Model.of(self.tokenizer.config, *self._types(), group_size=group_size, cache=cache)
        forecasts, note = self._forecasts(model, work, self.nodes.ranks), ""
        if all(forecast.why_not for forecast in forecasts):
            # A row that does not fit is an error row, and no reason to refuse the others.
            work = Work([min(work.lengths, key=sum)], work.rows)
            forecasts, note = self._forecasts(model, work, self.nodes.ranks), ", though the longest rows do not fit"
        if not forecasts:
            return None, "no engine can be forecast with these settings"
        good = [forecast for forecast in forecasts if not forecast.why_not]
        if not good:
            raise EngineError(self._nothing_fits(model, work, forecasts))
        fastest, *slower = good
        why = f"{fastest.tokens_per_second:,.0f} tokens/s are forecast{note}"
        why += "".join(f"; {forecast.tokens_per_second:,.0f} of {_in_words(forecast)}" for forecast in slower)
        why += "".join(
            f"; {_in_words(forecast)} does not fit: {forecast.why_not}" for forecast in forecasts if forecast.why_not
        )
        others = [name for name in self.engines if name not in {forecast.engine for forecast in forecasts}]
        for_gpus = [name for name in others if not find_engine(name).serves_cpu]
        if not self.nodes.machine.gpus and for_gpus:
            why += f"; made for GPUs, and there is none here: {', '.join(for_gpus)}"
        else:
            for_gpus = []
        why += "".join(f"; no forecast for {name}: --engine {name} says why" for name in others if name not in for_gpus)
        return fastest, f"{why}; the model has {model}"

    def _types(self) -> tuple[Any, str]:
        """The type that is computed in, and what the weights are rounded to; "": nothing."""
        from batchgen.models import loading

        config = self.tokenizer.config
        if self.dtype not in ("auto", *loading.FLOATING):
            return loading.own_dtype(config), self.dtype
        return loading.floating_dtype(self.dtype, config, on_gpu=self.nodes.machine.gpus > 0), ""

    def _forecasts(self, model: Model, work: Work, ranks: int) -> list[Forecast]:
        """The forecasts for `ranks` ranks, the best first; only those that need nothing more of the user."""
        from batchgen.planning import forecast

        machine, hosts, forecasts = self.nodes.machine, self.nodes.count, []
        # One rank may spread a model over all GPUs that it sees.
        for gpus in {ranks, max(1, machine.gpus)} if ranks == 1 else {ranks}:
            node = forecast.Node(machine.device(model.dtype), gpus, hosts * machine.host_memory, hosts=hosts)
            candidates = [
                candidate
                for candidate in forecast.forecasts(model, work, node, {}, self.engines)
                if candidate.placement.ranks == ranks
                and not candidate.placement.disk  # whose folder only the user knows
            ]
            forecasts += [candidate for candidate in candidates if self._is_asked_for(candidate, candidates)] or [
                # Each is one of groups, be they of one rank.
                candidate
                for candidate in candidates
                if not ({find_engine(candidate.engine).group_setting} | _names(candidate.placement.settings))
                & _names(self.given)
            ]
        if not machine.gpus:  # unless the settings, or the model, ask for one of the others
            forecasts = [candidate for candidate in forecasts if find_engine(candidate.engine).serves_cpu] or forecasts
        return sorted(forecasts, key=lambda candidate: (bool(candidate.why_not), candidate.seconds))

    def _is_asked_for(self, forecast: Forecast, there: Sequence[Forecast]) -> bool:
        """Whether its placement is what the given settings say, of those that the placements differ in."""
        differing = {name for other in there for name in _names(other.placement.settings)}
        # A rank with a whole model names no group in its placement.
        settings = {
            f"{find_engine(forecast.engine).group_setting}={forecast.placement.sharing}",
            *forecast.placement.settings,
        }
        return {text for text in self.given if _names([text]) <= differing} <= settings

    def _nothing_fits(self, model: Model, work: Work, forecasts: Sequence[Forecast]) -> str:
        lines = [f"no engine has room for this model with {self.nodes.ranks} rank(s):"]
        lines += [f"  {_in_words(forecast)}: {forecast.why_not}" for forecast in forecasts]
        lines.append(f"The model has {model}.")
        for ranks in range(self.nodes.ranks + 1, self.nodes.machine.gpus + 1) if self.nodes.count == 1 else ():
            fit = [forecast for forecast in self._forecasts(model, work, ranks) if not forecast.why_not]
            if fit:
                return "\n".join([*lines, f"With --gpus {ranks}, {_in_words(fit[0])} has."])
        lines.append(
            "Use more GPUs, a smaller --dtype, or let the weights wait on a local disk: --offload nvme=FOLDER. "
            "An --engine that is named is tried all the same"
        )
        return "\n".join(lines)


def _names(settings: Iterable[str]) -> set[str]:
    return {text.partition("=")[0] for text in settings}


def _in_words(forecast: Forecast) -> str:
    return " ".join([forecast.engine, *forecast.placement.settings])
