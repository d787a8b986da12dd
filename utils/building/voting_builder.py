"""The section `runs.score_ensemble` of `build-ensemble`: votes, weights and greedy selection over all the members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from utils.building import ensembles, family_fits, fitting
from utils.building.builder_protocol import Build, Builder, Session
from utils.building.fitting import Fitted, OutOfSampleRows
from utils.combiners.protocol import Combiner
from utils.core.errors import UserError

METHOD_OF = {name: method for method, name in ensembles.NAMES.items()}
"""{ensemble: method}"""


class VotingBuilder(Builder):
    """One ensemble per method of `utils.ensemble_methods`, over all selected members."""

    config_key = "runs.score_ensemble"

    def names(self, session: Session) -> list[str]:
        """Return one name per listed method that this version has."""
        settings = session.config.runs.score_ensemble
        methods = settings.methods if settings.enable else ()
        return [ensembles.NAMES[method] for method in methods if method in ensembles.NAMES]

    def covers(self, session: Session, name: str) -> bool:
        """Return whether it is a voting ensemble, also if not listed: the digest does not depend on the section."""
        return name in METHOD_OF

    def check(self, session: Session) -> None:
        """Raise UserError if no listed method can be built."""
        config, methods = session.config, session.config.runs.score_ensemble.methods
        if not self.names(session):
            raise UserError(
                f"{config.source}: runs.score_ensemble.methods names nothing that can be built "
                f"({', '.join(methods) or 'empty'}); choose from {', '.join(ensembles.NAMES)}"
            )

    def problems(self, session: Session) -> list[str]:
        """Return the listed methods that this version does not have."""
        unknown = [name for name in session.config.runs.score_ensemble.methods if name not in ensembles.NAMES]
        return [f"{method}: this version builds {', '.join(ensembles.NAMES)}" for method in unknown]

    def inputs_digest(self, session: Session, name: str) -> str:
        """Return the digest of members, images and the method's settings."""
        return fitting.inputs_digest(session.config, session.store, session.members, METHOD_OF[name])

    def build(self, session: Session, names: Sequence[str], *, force: bool = False) -> Build:
        """Fit each method on the rows of `fit_rows`, or on all out-of-sample rows if it learns nothing."""
        config, store, members = session.config, session.store, session.members
        session.ensure(members)
        facts = fitting.member_facts(store, members)
        recipes = [ensembles.COMBINERS[METHOD_OF[name]].configured(config, facts) for name in names]
        kinds = [config.runs.score_ensemble.fit_rows if recipe.learns else "honest" for recipe in recipes]
        rows = {kind: session.rows(members, kind=kind) for kind in dict.fromkeys(kinds)}
        tasks = list(zip(recipes, kinds, strict=True))
        n_logits = max(each.rows.logits.size for each in rows.values())
        results = family_fits.fit_each(
            _fit,
            tasks,
            shared=(rows,),
            description="combinations",
            n_logits=n_logits,
            are_nested=any(recipe.learns for recipe in recipes),
        )
        for name, kind, fitted in zip(names, kinds, results, strict=True):
            if isinstance(fitted, UserError):
                raise fitted
            fitting.save(store, name, METHOD_OF[name], fitted, members, rows[kind])
        return Build(session, tuple(names))


def _fit(rows: Mapping[str, OutOfSampleRows], recipe_and_kind: tuple[Combiner, str]) -> Fitted:
    recipe, kind = recipe_and_kind
    return fitting.fit(recipe, rows[kind])
